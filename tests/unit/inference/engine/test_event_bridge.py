"""Events of a step are handed over before the next one computes."""

import asyncio
from typing import Any

import pytest
import torch

from luthier.inference.engine.engine import EventBridge
from luthier_cpu.codegen.openmp import Program
from tests.unit.inference.artifacts import load_plain, pack
from tests.unit.inference.sequences import ask


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_events_are_handed_over_right_before_the_kernels_of_every_step(base_folder, monkeypatch, dtype):
    executor = pack(load_plain(base_folder).to(dtype), base_folder)
    executor.scheduler.add(ask([5, 6, 7], 9).sequence)
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
    # A prompt beside a sequence that answers.
    executor.scheduler.add(ask([9, 8, 7, 6], 9).sequence)
    order.clear()
    executor.step()
    assert order == ["hand over", "layers"]


def test_a_loop_is_woken_once_for_all_events_of_a_flush_and_a_closed_one_never(monkeypatch):
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
