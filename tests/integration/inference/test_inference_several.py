"""Two inference servers as processes: which one answers, and what one that is killed takes with it."""

import asyncio
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from luthier.core.errors import LuthierError, UnavailableError
from luthier.core.inference import HEADER_DIGEST, ModelTarget
from luthier.inference.server.__main__ import open_socket
from luthier.serving import open_all
from luthier.serving.base import Backend, Reply
from tests.conftest import wait_until
from tests.inference_server import BARE, CHAT, COMPLETIONS, make_settings
from tests.integration.inference.test_inference_process import start_process


class Processes:
    """Two servers, each on a socket of its own."""

    def __init__(self, folder: Path) -> None:
        self.paths = [folder / "one.sock", folder / "two.sock"]
        self.url = ",".join(f"unix://{path}" for path in self.paths)
        self.running = [start_process(folder, LUTHIER_INFERENCE_URL=f"unix://{path}") for path in self.paths]

    def state(self, number: int) -> dict[str, object]:
        transport = httpx2.HTTPTransport(uds=str(self.paths[number]))
        with httpx2.Client(transport=transport, base_url="http://inference", timeout=60) as client:
            return client.get("/internal/state").json()

    def is_ready(self, number: int) -> bool:
        assert self.running[number].poll() is None
        try:
            return bool(self.state(number)["ready"])
        except httpx2.TransportError:
            return False

    def holders(self, target: ModelTarget) -> list[int]:
        return [
            number
            for number, process in enumerate(self.running)
            if process.poll() is None and target.digest in list(self.state(number)["digests"])
        ]

    def stop(self) -> None:
        for process in self.running:
            process.kill()
            process.communicate()


@pytest.fixture
def processes(folder: Path, base_folder: Path) -> Iterator[Processes]:
    started = Processes(folder)
    try:
        wait_until(lambda: started.is_ready(0) and started.is_ready(1), seconds=120, what="both serve")
        yield started
    finally:
        started.stop()


async def _chat(backend: Backend, target: ModelTarget) -> Reply:
    body = {"model": "m", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2, "temperature": 0}
    reply = await backend.complete(CHAT, json.dumps(body).encode(), target)
    content = json.loads(reply.content)
    assert reply.status == 200, content
    return reply


async def _stream(backend: Backend, target: ModelTarget) -> Reply:
    # Enough work for seconds, so that the kill comes in the middle of it.
    body = {"model": "m", "prompt": ["a"] * 128, "max_tokens": 250, "stream": True}
    reply = await backend.complete(COMPLETIONS, json.dumps(body).encode(), target)
    assert (await anext(reply.events)).startswith(b"data: ")
    return reply


def test_a_model_stays_where_it_is_and_a_killed_process_takes_only_its_own_requests(
    folder: Path, processes: Processes, artifacts: list[tuple[ModelTarget, Path]]
) -> None:
    target = artifacts[0][0]

    async def run() -> None:
        backend = open_all(make_settings(folder, inference_url=processes.url))
        replies = [await _chat(backend, target) for _ in range(3)]
        assert {reply.headers[HEADER_DIGEST] for reply in replies} == {target.digest}
        (holder,) = processes.holders(target)
        other = 1 - holder
        # One stream on each process: the bare base goes where less is open.
        lost = await _stream(backend, target)
        # It goes no further, however long the rest takes to begin.
        processes.running[holder].send_signal(signal.SIGSTOP)
        kept = await _stream(backend, BARE)
        assert processes.state(other)["running"] != 0
        processes.running[holder].send_signal(signal.SIGKILL)
        # Until it is gone its socket still takes connections, which then end.
        await asyncio.to_thread(processes.running[holder].wait)
        with pytest.raises(UnavailableError, match="broke off in the middle"):
            async for _ in lost.events:
                pass
        await _chat(backend, target)
        assert processes.holders(target) == [other]
        last = b""
        async for piece in kept.events:
            last = piece
        assert last.endswith(b"data: [DONE]\n\n")
        assert (await backend.health()).is_ready
        await backend.aclose()

    asyncio.run(asyncio.wait_for(run(), 120))


def test_a_process_of_several_urls_says_what_to_do() -> None:
    with pytest.raises(LuthierError, match="names several servers"):
        open_socket("unix:///a.sock,unix:///b.sock")
