"""The straight line with the real small model: upload, fine-tune through kills, chat, download, restart."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from luthier.bases.catalogue import base_folder, find_base_facts
from luthier.client import LuthierClient
from luthier.core.settings import Settings
from tests.conftest import wait_until
from tests.stack import ROOT, Stack, descendants, is_alive, real_stack

BASE = "smollm2-135m-instruct"
NUM_ROWS = 12
NUM_ANSWERS = 4
_TRAIN_FILE = ROOT / "examples" / "support" / "train.jsonl"
_HELD_OUT_FILE = ROOT / "examples" / "support" / "heldout.jsonl"
# Training on a busy machine takes its time.
_wait = functools.partial(wait_until, seconds=300)


@pytest.fixture(scope="module")
def base() -> Path:
    bases_dir = Settings(_env_file=None).bases_dir
    if find_base_facts(bases_dir, BASE) is None:
        pytest.fail(f"the base is missing: run `luthier bases fetch {BASE}` (make setup does)")
    return base_folder(bases_dir, BASE)


@pytest.fixture(scope="module")
def stack(base: Path) -> Iterator[Stack]:
    with real_stack(
        # Short, so that a dead worker's job is taken over within seconds.
        LUTHIER_LEASE_SECONDS="4",
        LUTHIER_HEARTBEAT_SECONDS="1",
        LUTHIER_SWEEP_SECONDS="1",
        # A process that waits for a job must not be taken for the one that trains.
        LUTHIER_WARM_SPARE_SECONDS="0",
    ) as made:
        yield made


@pytest.fixture
def client(stack: Stack) -> openai.OpenAI:
    return stack.client()


def _messages(client: openai.OpenAI, job_id: str) -> list[str]:
    return [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100)]


def _step(client: openai.OpenAI, job_id: str) -> int:
    steps = [m for m in _messages(client, job_id) if m.startswith("Step ")]
    return int(steps[0].split()[1].split("/")[0]) if steps else 0


@pytest.fixture(scope="module")
def job(stack: Stack) -> Any:
    """A job whose training process and then whose worker were killed on the way."""
    client = stack.client(max_retries=2, timeout=60)
    rows = _TRAIN_FILE.read_bytes().splitlines(keepends=True)[:NUM_ROWS]
    file = client.files.create(file=("rows.jsonl", b"".join(rows)), purpose="fine-tune")
    made = client.fine_tuning.jobs.create(
        model="gpt-4o-mini-2024-07-18",
        training_file=file.id,
        seed=3,
        suffix="e2e",
        extra_body={"training": {"save_every_steps": 1}},
        hyperparameters={"n_epochs": 2, "batch_size": 4},
    )
    _wait(lambda: _step(client, made.id) >= 2, "step 2")
    os.kill(stack.pid_of("luthier.training"), signal.SIGKILL)
    _wait(lambda: any(m.startswith("Resuming from") for m in _messages(client, made.id)), "a resume")
    _wait(lambda: _step(client, made.id) >= 4, "step 4")
    worker = stack.pid_of("-m\0worker")
    below = descendants(worker)
    os.kill(worker, signal.SIGKILL)
    wait_until(lambda: not any(is_alive(pid) for pid in below), "the dead worker's processes are gone")
    _wait(lambda: client.fine_tuning.jobs.retrieve(made.id).status in ("succeeded", "failed"), "the end")
    return client.fine_tuning.jobs.retrieve(made.id)


def test_a_job_survives_kills_and_makes_exactly_one_model(client: openai.OpenAI, job: Any) -> None:
    assert job.status == "succeeded", job.error
    assert job.model == BASE
    messages = _messages(client, job.id)
    assert sum(m.startswith("Resuming from the save point at step") for m in messages) == 2
    assert messages.count(f"New fine-tuned model created: {job.fine_tuned_model}") == 1
    tuned = [model.id for model in client.models.list() if model.id.startswith("ft:")]
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id).data
    assert sorted(tuned) == sorted(c.fine_tuned_model_checkpoint for c in checkpoints)
    assert [c.step_number for c in checkpoints] == [6, 3]
    assert checkpoints[0].fine_tuned_model_checkpoint == job.fine_tuned_model


def _ask(client: openai.OpenAI, model: str, question: str, **more: Any) -> Any:
    messages: Any = [{"role": "user", "content": question}]
    return client.chat.completions.create(
        model=model, messages=messages, temperature=0, max_tokens=12, **more
    )


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI, job: Any) -> None:
    for model in (BASE, job.fine_tuned_model):
        whole = _ask(client, model, "My order came late.")
        chunks = list(_ask(client, model, "My order came late.", stream=True))
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert streamed == whole.choices[0].message.content
        assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason
        assert whole.model == model


def test_the_command_line_prints_the_same_answer(client: openai.OpenAI, job: Any, stack: Stack) -> None:
    question = "My order came late."
    command = [sys.executable, "-m", "luthier.cli.main", "chat", job.fine_tuned_model, question]
    options = ["--max-tokens", "12", "--temperature", "0", "--home", str(stack.home)]
    done = subprocess.run(command + options, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    answer = _ask(client, job.fine_tuned_model, question).choices[0].message.content
    assert done.stdout.rstrip("\n") == answer.rstrip("\n")


def test_answers_equal_the_downloaded_adapter_in_plain_peft(
    client: openai.OpenAI, job: Any, stack: Stack, base: Path, tmp_path: Path
) -> None:
    """Log-probabilities within 1e-4 and equal greedy tokens over 4 answers, all in float32."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    with LuthierClient(**stack.connection()) as ours:
        ours.download_model(job.fine_tuned_model, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    rows = [json.loads(line) for line in _HELD_OUT_FILE.read_text().splitlines()[:NUM_ANSWERS]]
    for row in rows:
        question = next(m["content"] for m in row["messages"] if m["role"] == "user")
        answer = _ask(client, job.fine_tuned_model, question, logprobs=True, top_logprobs=2).choices[0]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=False
        )
        said = answer.logprobs.content
        made = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=len(said),
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        for token, logits_1V, expected_id in zip(
            said, made.logits, made.sequences[0, len(prompt) :].tolist(), strict=True
        ):
            expected_V = torch.log_softmax(logits_1V[0].double(), dim=-1)
            # A token may be a part of a character, which decodes to no text of its own.
            assert token.bytes == [byte_of[c] for c in tokenizer.convert_ids_to_tokens(expected_id)]
            assert token.logprob == pytest.approx(float(expected_V[expected_id]), abs=1e-4)
        assert len(said) >= 1


def test_all_answers_again_after_a_restart(client: openai.OpenAI, job: Any, stack: Stack) -> None:
    before = stack.connection()
    files = {file.id for file in client.files.list()}
    answer = _ask(client, job.fine_tuned_model, "Where is my parcel?").choices[0].message.content
    stack.stop()
    stack.start(LUTHIER_WARM_SPARE_SECONDS="60").until_ready()
    # One for each process of the worker, before there is a job.
    wait_until(lambda: _num_spares(stack) == 2, what="processes with their imports done wait for jobs")
    assert stack.connection() == before
    again = stack.client()
    assert {file.id for file in again.files.list()} == files
    assert again.fine_tuning.jobs.retrieve(job.id) == job
    assert _ask(again, job.fine_tuned_model, "Where is my parcel?").choices[0].message.content == answer
    assert again.files.content(job.training_file).read().count(b"\n") == NUM_ROWS


def _num_spares(stack: Stack) -> int:
    commands = []
    for pid in descendants(stack.running.pid):
        with contextlib.suppress(OSError):
            commands.append(Path(f"/proc/{pid}/cmdline").read_bytes())
    return sum(b"luthier.training\0--forks" in command for command in commands)


@pytest.mark.full
def test_the_quickstart_of_the_readme_runs_as_printed(stack: Stack) -> None:
    connection = stack.connection()
    environment = os.environ | {
        "OPENAI_BASE_URL": connection["base_url"],
        "OPENAI_API_KEY": connection["api_key"],
    }
    result = subprocess.run(
        [sys.executable, ROOT / "examples" / "quickstart.py"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("deleted: True") == 2
