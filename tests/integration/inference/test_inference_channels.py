"""Streams that leave by a channel say what they say in answers of their own, and end as those do."""

import asyncio
import json
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from luthier.core.errors import LuthierError, UnavailableError
from luthier.core.inference import HEADER_CHANNEL, ModelTarget
from luthier.inference import lane
from luthier.inference.backends.base import Reply
from luthier.inference.backends.engine import EngineBackend
from tests.inference_server import BARE, CHAT, COMPLETIONS, Served, wait_until
from tests.integration.inference.test_inference_process import start_process

ResultT = TypeVar("ResultT")
RESPONSES = "/v1/responses"
MESSAGES = [{"role": "user", "content": "the sky"}]
DEFAULTS = {"model": "m", "stream": True, "temperature": 0}
BODIES: list[tuple[str, dict[str, Any]]] = [
    (CHAT, {"messages": MESSAGES, "max_tokens": 30}),
    (CHAT, {"messages": MESSAGES, "max_tokens": 9, "n": 3, "temperature": 1.0, "seed": 7}),
    (CHAT, {"messages": MESSAGES, "max_tokens": 9, "logprobs": True, "top_logprobs": 2}),
    (CHAT, {"messages": MESSAGES, "max_tokens": 9, "stream_options": {"include_usage": True}}),
    (COMPLETIONS, {"prompt": ["the sky", "a"], "max_tokens": 12, "echo": True, "logprobs": 1}),
    (COMPLETIONS, {"prompt": "the sky", "max_tokens": 1}),
    (COMPLETIONS, {"prompt": "the sky", "max_tokens": 0, "echo": True}),
    (RESPONSES, {"input": "the sky", "max_output_tokens": 12}),
]
# Of one answer alone.
_OWN = {"id", "created", "created_at", "item_id"}


def with_backend(url: str, work: Callable[[EngineBackend], Awaitable[ResultT]]) -> ResultT:
    """Run work with a client of a server."""

    async def run() -> ResultT:
        backend = EngineBackend(url)
        try:
            return await asyncio.wait_for(work(backend), 60)
        finally:
            await backend.aclose()

    return asyncio.run(run())


async def ask(backend: EngineBackend, path: str, body: dict[str, Any], target: ModelTarget = BARE) -> Reply:
    """Ask for a stream."""
    return await backend.complete(path, json.dumps(DEFAULTS | body).encode(), target)


async def open_channel(backend: EngineBackend) -> None:
    """Wait until streams leave by a channel."""
    async with asyncio.timeout(30):
        while backend._channel._open is None:
            reply = await ask(backend, COMPLETIONS, {"prompt": "a", "max_tokens": 1})
            assert [piece async for piece in reply.body]


def is_by_channel(reply: Reply) -> bool:
    """Whether a stream's own answer waits for what comes by the channel."""
    return bool(reply.body._connection._is_fed)  # type: ignore[attr-defined]


def read_events(content: bytes) -> list[Any]:
    """Return a stream's events without what no two answers share."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key not in _OWN}
        return [strip(item) for item in value] if isinstance(value, list) else value

    lines = [line.removeprefix(b"data: ") for line in content.split(b"\n") if line.startswith(b"data: ")]
    return [line if line == b"[DONE]" else strip(json.loads(line)) for line in lines]


def test_every_stream_says_by_a_channel_what_it_says_in_its_own_answer(
    served: Served, artifacts: list[tuple[ModelTarget, Path]]
) -> None:
    cases = [(path, body, target) for path, body in BODIES for target in (BARE, artifacts[0][0])]

    async def by_channel(backend: EngineBackend) -> list[bytes]:
        await open_channel(backend)
        told = []
        for case in cases:
            reply = await ask(backend, *case)
            assert is_by_channel(reply)
            # Not a header for clients.
            assert HEADER_CHANNEL not in reply.headers
            assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
            told.append(b"".join([piece async for piece in reply.body]))
        return told

    alone = []
    for path, body, target in cases:
        asked = DEFAULTS | body
        response = served.client.post(path, json=asked, headers=target.to_headers())
        assert response.status_code == 200
        alone.append(read_events(response.content))
    told = with_backend(served.url, by_channel)
    assert [read_events(content) for content in told] == alone
    assert all(len(events) > 1 for events in alone)


def test_what_fails_before_its_first_token_is_an_error_and_no_stream(served: Served) -> None:
    async def work(backend: EngineBackend) -> None:
        await open_channel(backend)
        reply = await ask(backend, CHAT, {"messages": MESSAGES, "max_tokens": 10**6})
        assert reply.status == 400
        content = b"".join([piece async for piece in reply.body])
        assert json.loads(content)["error"]["type"] == "invalid_request_error"
        # Nothing of it is left.
        assert not backend._channel._open._connections  # type: ignore[union-attr]

    with_backend(served.url, work)


def test_what_fails_later_ends_its_stream_with_an_error_and_nobody_elses(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose = lane.sampler.choose

    def fail(logits: Any, sequences: list[Any], *places: Any) -> Any:
        for one in sequences:
            if one.num_completion_tokens == 2 and one.options.max_tokens == 77:
                one.fail(LuthierError("a fault"))
        return choose(logits, sequences, *places)

    async def work(backend: EngineBackend) -> tuple[bytes, bytes]:
        await open_channel(backend)
        other = await ask(backend, COMPLETIONS, {"prompt": "a", "max_tokens": 200})
        assert is_by_channel(other)
        # Both are under way at the moment of the failure.
        served.runner.gate.clear()
        try:
            monkeypatch.setattr(lane.sampler, "choose", fail)
            asking = asyncio.ensure_future(ask(backend, COMPLETIONS, {"prompt": "b", "max_tokens": 77}))
            async with asyncio.timeout(20):
                while len(served.service._open) < 2:
                    await asyncio.sleep(0.01)
        finally:
            served.runner.gate.set()
        failing = await asking
        assert is_by_channel(failing)
        told = b"".join([piece async for piece in failing.body])
        return told, b"".join([piece async for piece in other.body])

    told, other = with_backend(served.url, work)
    assert read_events(told)[-1]["error"]["message"] == "a fault"
    assert read_events(other)[-1] == b"[DONE]"


def test_a_reader_who_leaves_gives_its_row_back(served: Served) -> None:
    async def work(backend: EngineBackend) -> None:
        await open_channel(backend)
        reply = await ask(backend, COMPLETIONS, {"prompt": "a", "max_tokens": 230})
        assert is_by_channel(reply)
        assert await anext(reply.body)
        served.runner.gate.clear()
        try:
            [generation] = served.service._open
            await reply.body.aclose()
            async with asyncio.timeout(10):
                while served.service._open:
                    await asyncio.sleep(0.01)
        finally:
            served.runner.gate.set()
        assert generation.num_completion_tokens < 230

    with_backend(served.url, work)


def test_a_channel_whose_reader_has_left_is_forgotten(served: Served) -> None:
    with_backend(served.url, open_channel)
    wait_until(lambda: not served.service._channels._channels, "the channel's end")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_server_that_ends_takes_its_streams_along_and_they_say_so(
    folder: Path, base_folder: Path, number: signal.Signals
) -> None:
    url = f"unix://{folder}/c{int(number)}.sock"
    process = start_process(folder, LUTHIER_INFERENCE_URL=url)

    async def is_ready(backend: EngineBackend) -> bool:
        assert process.poll() is None
        try:
            return (await backend.health()).is_ready
        except UnavailableError:
            return False

    async def work(backend: EngineBackend) -> list[bytes]:
        await open_channel(backend)
        # Enough work for seconds, so that the signal comes in the middle of it.
        reply = await ask(backend, COMPLETIONS, {"prompt": ["a"] * 128, "max_tokens": 250})
        assert is_by_channel(reply)
        pieces = [await anext(reply.body)]
        process.send_signal(number)
        try:
            pieces += [piece async for piece in reply.body]
        except UnavailableError as error:
            pieces.append(f"data: {json.dumps(error.to_body())}\n\n".encode())
        return pieces

    try:
        wait_until(lambda: with_backend(url, is_ready), "the process")
        events = read_events(b"".join(with_backend(url, work)))
        assert events[-1]["error"]["code"] == "service_unavailable"
        assert process.wait(10) == (0 if number == signal.SIGTERM else -signal.SIGKILL)
    finally:
        process.kill()
        process.communicate()
