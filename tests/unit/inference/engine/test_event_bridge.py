"""Events of a step are handed over before the next one computes, and nobody waits for longer than that."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.inference.engine.engine import EventBridge
from luthier.inference.engine.sequence import SamplingOptions, Sequence
from luthier_cpu.codegen.openmp import Program
from tests.tiny import BASE_ID, build_tiny_base
from tests.unit.inference.artifacts import load_plain, pack
from tests.unit.inference.engine.test_scheduler import Ids


def sequence(prompt_ids: list[int]) -> Sequence:
    """Return a request for some tokens of the bare base."""
    served = type("Served", (), {"adapter": None})
    options = SamplingOptions(max_tokens=9, temperature=0.0)
    return Sequence((BASE_ID, None), served, prompt_ids, options, Ids(), frozenset(), lambda _: None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_events_are_handed_over_right_before_the_kernels_of_every_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    base = load_plain(build_tiny_base(tmp_path / BASE_ID)).to(dtype)
    executor = pack(base, tmp_path / BASE_ID, max_rows=4, max_cache_tokens=512)
    executor.scheduler.add(sequence([5, 6, 7]))
    for _ in range(2):
        # The second writes the program down, which runs the layers.
        executor.step()
    order: list[str] = []
    run_layers, run_program = executor.runner.model.run_layers, Program.run

    def layers(*given: Any) -> torch.Tensor:
        order.append("layers")
        return run_layers(*given)

    def program(self: Program) -> None:
        order.append("program")
        run_program(self)

    executor.on_launch = lambda: order.append("hand over")
    monkeypatch.setattr(executor.runner.model, "run_layers", layers)
    monkeypatch.setattr(Program, "run", program)
    executor.step()
    assert order == ["hand over", "layers" if executor.runner.model._programs is None else "program"]
    # A prompt beside a row that answers.
    executor.scheduler.add(sequence([9, 8, 7, 6]))
    order.clear()
    executor.step()
    assert order == ["hand over", "layers"]


def test_a_loop_is_woken_once_for_all_events_of_a_flush_and_a_closed_one_never(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bridge, taken, calls = EventBridge(), [], []

    async def follow() -> None:
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *given: calls.append(wake(*given)))
        for event in range(3):
            bridge.add(loop, taken.append, event)
        assert not calls
        bridge.flush()
        await asyncio.sleep(0)
        assert (taken, len(calls)) == ([0, 1, 2], 1)
        bridge.add(loop, taken.append, 3)
        monkeypatch.undo()

    asyncio.run(follow())
    bridge.flush()
    assert taken == [0, 1, 2]
