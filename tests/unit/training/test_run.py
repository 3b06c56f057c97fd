"""How a run that can't go on says so."""

import os
from pathlib import Path

import pytest
import torch

from luthier.core.events import FailedEvent, parse_event
from luthier.training import run as run_module
from luthier.training.run import run
from luthier.training.signals import StopRequest
from tests.tiny import build_tiny_base, build_tiny_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build_tiny_run(tmp_path / "run", build_tiny_base(tmp_path / "bases" / "tiny-llama"))


def run_failing(folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> FailedEvent:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(run_module, "_prepare", fail)
    reader, writer = os.pipe()
    try:
        assert not run(folder, writer, StopRequest())
        event = parse_event(os.read(reader, 65536))
    finally:
        os.close(reader)
        os.close(writer)
    assert isinstance(event, FailedEvent)
    return event


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 12 bytes"),
        MemoryError(),
    ],
)
def test_memory_that_ran_out_ends_the_job_with_advice(
    folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    event = run_failing(folder, error, monkeypatch)
    assert (event.code, event.is_retryable) == ("out_of_memory", False)
    assert "batch_size" in event.message


def test_an_error_of_our_own_making_is_not_dressed_up_as_the_users(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError, match="shape"):
        run_failing(folder, RuntimeError("shape mismatch"), monkeypatch)
