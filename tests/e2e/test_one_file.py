"""A tuning method and a row format are one file each: nothing else in the tree knows of them."""

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest

from tests.architecture.sources import ROOMS
from tests.rows import jsonl
from tests.stack import ROOT, stack_folder, tiny_stack
from tests.tiny import BASE_ID

_DROP_INS = Path(__file__).parent / "drop_ins"
_QUESTIONS = ["red?", "blue?", "the sky?", "the sea?"]


@pytest.fixture
def tree() -> Iterator[Path]:
    """Hold a copy of the product with one more method and one more format."""
    with stack_folder() as folder:
        for room in ROOMS:
            shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "alembic.ini", folder)
        shutil.copy(_DROP_INS / "ia3.py", folder / "luthier/methods")
        shutil.copy(_DROP_INS / "question.py", folder / "luthier/data/formats")
        yield folder


def _answer(client: openai.OpenAI, model: str, question: str) -> str:
    completion = client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=8, temperature=0
    )
    return completion.choices[0].message.content or ""


def test_a_new_method_and_a_new_format_train_publish_and_serve_beside_others(tree: Path) -> None:
    with tiny_stack(tree, PYTHONPATH=str(tree)) as stack:
        client = openai.OpenAI(**json.loads((stack.home / "connection.json").read_text()), max_retries=0)
        rows = jsonl([{"question": question, "reply": "blue"} for question in _QUESTIONS * 4])
        file_id = client.files.create(file=("rows.jsonl", rows), purpose="fine-tune").id
        models = [BASE_ID]
        for method in ("ia3", "lora"):
            job = client.fine_tuning.jobs.create(
                model=BASE_ID,
                training_file=file_id,
                hyperparameters={"n_epochs": 30},
                extra_body={"tuning": {"type": method}},
            )
            while job.finished_at is None:
                time.sleep(0.2)
                job = client.fine_tuning.jobs.retrieve(job.id)
            assert job.status == "succeeded", job.error
            models.append(str(job.fine_tuned_model))
        asked = [(model, question) for model in models for question in _QUESTIONS]
        alone = [_answer(client, *one) for one in asked]
        with ThreadPoolExecutor(len(asked)) as threads:
            together = list(threads.map(lambda one: _answer(client, *one), asked))
        assert together == alone
        # Both learnt the reply, and the base does not know it.
        by_model = [alone[start : start + len(_QUESTIONS)] for start in range(0, len(alone), len(_QUESTIONS))]
        assert by_model[1:] == [["blue"] * len(_QUESTIONS)] * 2, by_model
        assert "blue" not in by_model[0]
