"""`luthier up` with the whole real service over the tiny base: its parts are killed, then it is."""

import json
import os
import signal
from collections.abc import Iterator

import httpx2
import pytest

from tests.stack import Stack, descendants, is_alive, tiny_stack, wait_until
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


def _chat(stack: Stack) -> int:
    """Return the status of a short chat: it goes through API, database and inference server."""
    connection = json.loads((stack.home / "connection.json").read_text())
    body = {"model": BASE_ID, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    headers = {"Authorization": f"Bearer {connection['api_key']}"}
    try:
        answer = httpx2.post(
            f"{connection['base_url']}/chat/completions", json=body, headers=headers, timeout=30.0
        )
    except httpx2.TransportError:
        return 0
    return answer.status_code


@pytest.mark.parametrize("name", list(_PARTS))
def test_a_killed_part_comes_back_and_the_service_answers_again(stack: Stack, name: str) -> None:
    assert _chat(stack) == 200
    pid = stack.pid_of(_PARTS[name])
    os.kill(pid, signal.SIGKILL)
    stack.until_output(f"{name} died (killed by SIGKILL)")
    stack.until_output(f"{name} is back")
    assert stack.pid_of(_PARTS[name]) != pid
    wait_until(lambda: _chat(stack) == 200, f"a chat answers after {name} was killed")


def test_no_process_outlives_a_killed_supervisor(stack: Stack) -> None:
    below = descendants(stack.running.pid)
    assert len(below) >= len(_PARTS)
    stack.running.send_signal(signal.SIGKILL)
    stack.running.wait(timeout=10)
    wait_until(lambda: not [pid for pid in below if is_alive(pid)], "all processes end")
    stack.start().until_ready()
    assert _chat(stack) == 200
