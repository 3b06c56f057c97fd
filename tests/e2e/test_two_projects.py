"""Two projects on the real service: what one of them queues keeps nothing of the other waiting behind it."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from luthier.core.settings import Settings
from tests.conftest import wait_until
from tests.rows import colour_rows, jsonl
from tests.stack import Stack, real_stack

pytestmark = pytest.mark.full

BASE = "smollm2-135m-instruct"
NUM_JOBS = 200
NUM_CHATS = 256
_SECONDS = 600


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with real_stack(LUTHIER_BASES_DIR=str(Settings(_env_file=None).bases_dir)) as made:
        yield made


def _client(stack: Stack, project: str) -> openai.OpenAI:
    ours = stack.client(timeout=_SECONDS)
    made = ours.post("/keys", body={"name": project, "project": project}, cast_to=dict[str, Any])
    return ours.with_options(api_key=made["key"])


def _create(client: openai.OpenAI, count: int) -> list[str]:
    file = client.files.create(file=("rows.jsonl", jsonl(colour_rows(10))), purpose="fine-tune")
    make = client.fine_tuning.jobs.create
    parameters = {"n_epochs": 1, "batch_size": 10}
    return [
        make(model=BASE, training_file=file.id, hyperparameters=parameters, seed=seed).id
        for seed in range(count)
    ]


def test_200_queued_jobs_and_256_waiting_chats_keep_no_other_project_waiting(stack: Stack) -> None:
    crowd, other = _client(stack, "crowd"), _client(stack, "other")
    crowded = _create(crowd, NUM_JOBS)

    def ask(n: int) -> int:
        messages: Any = [{"role": "user", "content": f"Count from {n} on."}]
        answer = crowd.chat.completions.create(model=BASE, messages=messages, max_tokens=64)
        return answer.usage.completion_tokens

    with ThreadPoolExecutor(NUM_CHATS) as pool:
        chats = [pool.submit(ask, n) for n in range(NUM_CHATS)]
        wait_until(lambda: any(chat.done() for chat in chats), "the crowd's first answer")
        num_before = sum(chat.done() for chat in chats)
        answer = other.chat.completions.create(
            model=BASE, messages=[{"role": "user", "content": "Hello."}], max_tokens=8
        )
        num_after = sum(chat.done() for chat in chats)
        print(f"of the crowd's chats {num_before} were answered before the other's, {num_after} after it")
        assert answer.choices
        assert num_after < NUM_CHATS / 2
        assert all(chat.result() > 0 for chat in chats)

    begun = NUM_JOBS - _num_queued(crowd)
    [theirs] = _create(other, 1)
    deadline = time.monotonic() + _SECONDS
    while other.fine_tuning.jobs.retrieve(theirs).status in ("validating_files", "queued"):
        assert time.monotonic() < deadline, "the other project's job waits"
        time.sleep(0.1)
    num_begun = NUM_JOBS - _num_queued(crowd) - begun
    print(f"{num_begun} of the crowd's jobs began between the other's creation and its start")
    # One may be taken while the other's file is checked.
    assert num_begun <= 1
    assert _num_queued(crowd) > NUM_JOBS / 2
    for job_id in crowded:
        if crowd.fine_tuning.jobs.retrieve(job_id).finished_at is None:
            crowd.fine_tuning.jobs.cancel(job_id)


def _num_queued(client: openai.OpenAI) -> int:
    return sum(
        job.status in ("validating_files", "queued") for job in client.fine_tuning.jobs.list(limit=100)
    )
