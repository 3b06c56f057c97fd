"""What one request costs the server that answers everybody: memory, and time on its loop."""

import asyncio
import json
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.inference_server import BARE, CHAT, COMPLETIONS, Served

_MIB = 1024 * 1024
_HELLO = [{"role": "user", "content": "a"}]
_LONG_NAME = "k" * 125_000
_NUM_ENTRIES = 62_500


def _call(arguments: str) -> dict[str, Any]:
    return {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}


@contextmanager
def _peak() -> Iterator[list[int]]:
    """Give the most bytes that Python allocated meanwhile."""
    found: list[int] = []
    tracemalloc.start()
    try:
        yield found
        found.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()


@contextmanager
def _longest_pause(loop: asyncio.AbstractEventLoop) -> Iterator[list[float]]:
    """Give the longest time that the server's loop did not come back to its other tasks."""
    found = [0.0]

    async def watch() -> None:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.005)
            found[0] = max(found[0], time.monotonic() - before)

    watching = asyncio.run_coroutine_threadsafe(watch(), loop)
    try:
        yield found
    finally:
        watching.cancel()


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        # Quadratic when the name is repeated for each entry: 250 kB would be 8 GB.
        ({"user": {_LONG_NAME: [0] * _NUM_ENTRIES}}, 200, None),
        ({"stop": {_LONG_NAME: [0] * _NUM_ENTRIES}}, 400, "stop"),
        ({"tools": [[[[{"k" * 900: [0] * _NUM_ENTRIES}]]]]}, 400, "tools.0"),
        ({"stop": json.loads("[" * 65 + "0" + "]" * 65)}, 400, "stop" + ".0" * 63),
    ],
)
def test_the_memory_of_a_request_is_linear_in_its_bytes(
    served: Served, fields: dict[str, Any], status: int, param: str | None
) -> None:
    with _peak() as peak:
        response = served.post(CHAT, messages=_HELLO, max_tokens=1, **fields)
    assert response.status_code == status, response.text
    if status != 200:
        assert response.json()["error"]["param"] == param
    assert peak[0] < 32 * _MIB


@pytest.mark.parametrize(
    "fields",
    [
        # Eight megabytes of values, each of which would be an object of fifty bytes and more.
        {"metadata": {"a": [0] * 4_000_000}},
        {"messages": [{}] * 2_700_000},
        {"messages": [{"role": "assistant", "tool_calls": [_call("[" + "[]," * 2_700_000 + "0]")]}]},
    ],
    ids=["metadata", "messages", "arguments"],
)
def test_millions_of_values_are_refused_before_they_are_made_and_beside_the_loop(
    served: Served, fields: dict[str, Any]
) -> None:
    content = json.dumps({"model": "m", "messages": _HELLO} | fields, separators=(",", ":")).encode()
    headers = BARE.to_headers()
    with _longest_pause(served.loop) as pause:
        response = served.client.post(CHAT, content=content, headers=headers, timeout=120)
    assert response.status_code == 400
    assert "250000" in response.json()["error"]["message"]
    assert pause[0] < 1.0
    with _peak() as peak:
        served.client.post(CHAT, content=content, headers=headers, timeout=120)
    # The body itself, a few times over.
    assert peak[0] < 100 * _MIB


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (COMPLETIONS, {"prompt": [[1.5] * 200_000]}),
        (COMPLETIONS, {"prompt": "a", "stop": [1] * 200_000}),
        (CHAT, {"messages": [{"role": "user", "content": "a", "wrong": 1}] * 4000}),
    ],
)
def test_of_many_faults_only_the_first_is_collected(
    served: Served, path: str, fields: dict[str, Any]
) -> None:
    with _peak() as peak:
        response = served.post(path, **fields)
    assert response.status_code == 400
    assert peak[0] < 40 * _MIB


def test_a_body_with_more_commas_in_its_texts_than_it_may_have_values_is_answered(served: Served) -> None:
    response = served.post(CHAT, messages=[{"role": "user", "content": ',[{\\"' * 60_000}])
    assert response.json()["error"]["code"] == "context_length_exceeded"
