"""Whether this worker may claim jobs to train: not while its training processes die at once."""

import subprocess

import structlog

from luthier.core.errors import UnsuitableMachineError
from luthier.core.runtime import tied_python
from services.capacity import workers
from worker.context import WorkerContext
from worker.training_process.child import child_environment

_log = structlog.get_logger()
_TEST_SECONDS = 120.0
# What a training process does before its job: imports, and the device.
_TEST = """
import sys, torch, luthier.training.run
wants_cuda = sys.argv[1] == "cuda" or sys.argv[1] == "auto" and torch.cuda.is_available()
assert torch.ones(8, device="cuda" if wants_cuda else "cpu").sum().item() == 8
"""


def may_claim(context: WorkerContext) -> bool:
    """Whether no quarantine holds; one whose time is over ends by a test that succeeds."""
    with context.database.transaction() as session:
        found = workers.find_quarantine(session, context.worker_id)
    if found is None or not found.is_due:
        return found is None
    fault = test_machine(context)
    if fault is not None:
        _quarantine(context, fault)
        return False
    _log.info("the worker claims jobs to train again", reason=found.reason)
    with context.database.transaction() as session:
        workers.end_quarantine(session, context.worker_id)
    return True


def check_machine(context: WorkerContext) -> None:
    """Quarantine this worker, and raise UnsuitableMachineError, when no training process can run here."""
    fault = test_machine(context)
    if fault is not None:
        seconds = _quarantine(context, fault)
        raise UnsuitableMachineError(
            f"A worker ({context.hostname}) claims nothing to train for {seconds:.0f} s: {fault}."
        )


def _quarantine(context: WorkerContext, fault: str) -> float:
    pause_seconds = context.settings.lease_seconds
    with context.database.transaction() as session:
        seconds = workers.quarantine(session, context.worker_id, fault, pause_seconds=pause_seconds)
    _log.error("the worker claims nothing to train", fault=fault, seconds=seconds)
    return seconds


def test_machine(context: WorkerContext) -> str | None:
    """Start what a training process starts; return what is wrong, None when nothing is."""
    try:
        done = subprocess.run(
            tied_python("-c", _TEST, context.settings.device),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=child_environment(context.num_threads),
            timeout=_TEST_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"a training process could not be started ({type(error).__name__})"
    if done.returncode == 0:
        return None
    lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no output"]
    return f"a training process ends with exit code {done.returncode}: {lines[-1][:200]}"
