"""How many files a reader has to open to follow one chat."""

import json
import os
from pathlib import Path

import openai

from tests.architecture.sources import ROOMS
from tests.conftest import wait_until
from tests.stack import ROOT, Stack, tiny_stack
from tests.tiny import BASE_ID

# 28 are counted; what beats in the background may coincide with every walk.
_MAX_FILES = 30
_NUM_CHATS = 4
# Behind `ModelRunner.execute`.
_RUNNERS = ("luthier/modeling/", "luthier/inference/runners/", "luthier_cpu/")
_RECORDER = ROOT / "tests/called_files"


def _take(folder: Path, number: int, pids: list[int]) -> set[str]:
    """Return the product files that the processes have executed code in since the last call."""
    (folder / f"take-{number}").touch()
    answers = [folder / f"{number}-{pid}" for pid in pids]
    wait_until(lambda: all(answer.exists() for answer in answers), f"records of {pids}")
    paths = {line for answer in answers for line in answer.read_text().splitlines()}
    names = {os.path.relpath(path, ROOT) for path in paths if path.startswith(str(ROOT))}
    return {name for name in names if name.startswith(tuple(f"{room}/" for room in ROOMS))}


def _stream_a_chat(stack: Stack) -> None:
    connection = json.loads((stack.home / "connection.json").read_text())
    with openai.OpenAI(**connection, max_retries=0) as client:
        stream = client.chat.completions.create(
            model=BASE_ID, messages=[{"role": "user", "content": "red?"}], max_tokens=4, stream=True
        )
        assert len(list(stream)) > 1


def test_a_warm_streamed_chat_executes_code_in_few_files(tmp_path: Path) -> None:
    with tiny_stack(PYTHONPATH=str(_RECORDER), CALLED_FILES_DIR=str(tmp_path)) as stack:
        pids = [stack.pid_of("-m\0api"), stack.pid_of("luthier.inference.server")]
        walks = []
        for number in range(_NUM_CHATS):
            _stream_a_chat(stack)
            walks.append(_take(tmp_path, number, pids))
    # The first chat warms up; what beats in the background is not in every walk.
    walk = set.intersection(*walks[1:])
    files = sorted(name for name in walk if not name.startswith(_RUNNERS))
    print(f"files of a warm streamed chat: {len(files)} {files}")
    assert "api/routes/chat.py" in files
    assert len(files) <= _MAX_FILES, files
