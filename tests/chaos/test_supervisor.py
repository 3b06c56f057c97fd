"""`luthier up` with the whole real service over the tiny base: its parts are killed, then it is."""

import contextlib
import os
import signal
from collections.abc import Iterator

import openai
import pytest

from tests.conftest import wait_until
from tests.stack import Stack, descendants, is_alive, tiny_stack
from tests.tiny import BASE_ID

_PARTS = {
    "postgres": "bin/postgres",
    "valkey": "valkey-server",
    "inference": "luthier.inference.server",
    "api": "-m\0api",
    "worker": "-m\0worker",
}


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    with tiny_stack() as made:
        yield made


def _is_answering(stack: Stack) -> bool:
    """Whether a short chat succeeds: it goes through API, database and inference server."""
    messages = [{"role": "user", "content": "Hi"}]
    with contextlib.suppress(openai.APIError):
        stack.client(timeout=30).chat.completions.create(model=BASE_ID, messages=messages, max_tokens=2)
        return True
    return False


@pytest.mark.parametrize("name", list(_PARTS))
def test_a_killed_part_comes_back_and_the_service_answers_again(stack: Stack, name: str) -> None:
    assert _is_answering(stack)
    pid = stack.pid_of(_PARTS[name])
    os.kill(pid, signal.SIGKILL)
    stack.until_output(f"{name} died (killed by SIGKILL); starting it again in 0.5 s")
    stack.until_output(f"{name} is back")
    assert stack.pid_of(_PARTS[name]) != pid
    wait_until(lambda: _is_answering(stack), f"a chat answers after {name} was killed")


def test_no_process_outlives_a_killed_supervisor(stack: Stack) -> None:
    below, run = descendants(stack.running.pid), (stack.home / "run").resolve()
    assert len(below) >= len(_PARTS)
    stack.running.send_signal(signal.SIGKILL)
    stack.running.wait(timeout=10)
    wait_until(lambda: not [pid for pid in below if is_alive(pid)], "all processes end")
    stack.start().until_ready()
    assert _is_answering(stack)
    assert not run.exists()
