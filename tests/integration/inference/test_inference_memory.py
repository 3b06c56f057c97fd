"""What the inference server gives back when it is told to, over a real socket, and what answers then."""

import asyncio
import socket
from pathlib import Path
from typing import Any

import pytest

from luthier.core.inference import MEMORY_PATH, MemoryState, ModelTarget
from luthier.inference.bases import ReadyModel
from tests.inference_server import Served


def _tell(served: Served, max_bytes: int) -> MemoryState:
    version = _ask(served).version + 1
    body = {"version": version, "max_bytes": max_bytes, "seconds": 60}
    answer = served.client.post(MEMORY_PATH, json=body)
    assert answer.status_code == 200, answer.text
    return MemoryState.model_validate_json(answer.content)


def _ask(served: Served) -> MemoryState:
    return MemoryState.model_validate_json(served.client.get(MEMORY_PATH).content)


def _on_loop(served: Served, work: Any) -> Any:
    return asyncio.run_coroutine_threadsafe(work, served.loop).result(30)


def test_idle_artifacts_and_unused_pages_are_given_back_and_held_ones_answer_as_before(
    served: Served, artifacts: list[tuple[ModelTarget, Path]]
) -> None:
    targets = [target for target, _ in artifacts]
    before = [served.chat("the sky", target, max_tokens=8)["choices"] for target in targets]
    whole = _ask(served)
    assert (whole.hostname, whole.device, whole.version) == (socket.gethostname(), "cpu", 0)
    # 65536 tokens of the tiny base, of which hardly any have memory.
    assert whole.idle_bytes > 10_000_000
    held: ReadyModel = _on_loop(served, served.service.models.hold(targets[1]))
    told = _tell(served, 0)
    assert served.service.models.loaded.held == [targets[1].digest]
    assert told.held_bytes < whole.held_bytes
    assert told.floor_bytes <= told.held_bytes
    assert served.chat("the sky", targets[1], max_tokens=8)["choices"] == before[1]
    served.loop.call_soon_threadsafe(served.service.models.release, held)
    refused = served.post("/v1/chat/completions", targets[0], messages=[{"role": "user", "content": "a"}])
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "out_of_memory"
    assert int(refused.headers["retry-after"]) > 0
    assert _tell(served, 2**40).idle_bytes >= told.idle_bytes
    assert [served.chat("the sky", target, max_tokens=8)["choices"] for target in targets] == before


@pytest.mark.parametrize("body", [{}, {"version": 0, "max_bytes": 1, "seconds": 1}, {"max_bytes": "x"}])
def test_an_order_that_is_none_is_refused(served: Served, body: dict[str, Any]) -> None:
    answer = served.client.post(MEMORY_PATH, json=body)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_request"
