"""How a failed run reports its error, and how a stopped one continues."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from luthier.core.events import FailedEvent, StoppedEvent, TrainingEvent, parse_event
from luthier.training import run as run_module
from luthier.training.loop import evaluation as evaluate_module
from luthier.training.loop.evaluation import evaluate
from luthier.training.process_io import StoppedError, StopRequest
from luthier.training.run import run
from tests.tiny import build_tiny_base, build_tiny_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build_tiny_run(tmp_path / "run", build_tiny_base(tmp_path / "bases" / "tiny-llama"))


def run_whole(folder: Path) -> list[TrainingEvent]:
    """Run a directory in this process; return its events."""
    path = folder / "events.jsonl"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        run(folder, descriptor, StopRequest())
    finally:
        os.close(descriptor)
    return [parse_event(line) for line in path.read_bytes().splitlines()]


def test_a_validation_that_was_cut_short_is_made_up_for_and_the_step_reported_once(
    folder, tmp_path, monkeypatch
):
    undisturbed = tmp_path / "undisturbed"
    shutil.copytree(folder, undisturbed)
    expected = run_whole(undisturbed)
    num_scored = 0

    def evaluate_once(*arguments: Any, **options: Any) -> Any:
        nonlocal num_scored
        num_scored += 1
        # The base is scored first, on two sets of rows; TERM comes in the first epoch's validation.
        if num_scored == 3:
            raise StoppedError
        return evaluate(*arguments, **options)

    monkeypatch.setattr(evaluate_module, "evaluate", evaluate_once)
    first = run_whole(folder)
    assert isinstance(first[-1], StoppedEvent)
    second = run_whole(folder)
    for kind in ("step", "checkpoint"):
        reported = [(e.step, e.metrics) for e in first + second if e.type == kind]
        assert reported == [(e.step, e.metrics) for e in expected if e.type == kind]
    log = (folder / "artifact" / "training_log.jsonl").read_bytes()
    assert log == (undisturbed / "artifact" / "training_log.jsonl").read_bytes()


def run_failing(folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch) -> FailedEvent:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(run_module, "assemble", fail)
    reader, writer = os.pipe()
    try:
        assert not run(folder, writer, StopRequest())
        event = parse_event(os.read(reader, 65536))
    finally:
        os.close(reader)
        os.close(writer)
    assert isinstance(event, FailedEvent)
    return event


_NO_MEMORY = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: 12 bytes"
_NO_SPACE = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (RuntimeError(_NO_MEMORY), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "storage_full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "storage_full"),
        (SafetensorError(_NO_SPACE), "storage_full"),
    ],
)
def test_memory_that_ran_out_ends_the_job_with_advice_and_a_full_disk_is_tried_again(
    folder, error, code, monkeypatch
):
    event = run_failing(folder, error, monkeypatch)
    assert (event.code, event.is_retryable) == (code, code == "storage_full")
    assert code == "storage_full" or "smaller base" in event.message


@pytest.mark.parametrize(
    "error", [OSError(errno.EIO, "Input/output error"), RuntimeError("shape mismatch")], ids=str
)
def test_another_fault_is_not_called_a_full_disk_or_one_of_the_users(folder, error, monkeypatch):
    with pytest.raises(type(error), match=r"Input/output|shape"):
        run_failing(folder, error, monkeypatch)
