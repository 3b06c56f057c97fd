"""One run from start to end: read, build, train, verify, publish, or report why not."""

import errno
import time
from pathlib import Path

from safetensors import SafetensorError

from luthier.core.errors import LuthierError, OutOfMemoryError, StorageFullError
from luthier.core.events import FailedEvent, StoppedEvent
from luthier.training.build import assemble
from luthier.training.job import read_inputs, read_job
from luthier.training.loop.loop import Loop
from luthier.training.model.device import is_out_of_memory, out_of_memory
from luthier.training.process_io import EventWriter, StoppedError, StopRequest

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def run(folder: Path, events: int, stop: StopRequest) -> bool:
    """Train what a run directory asks for, and report it in events.

    Returns:
        True when the run finished or was stopped, False when it failed (after a `failed` event).
    """
    inputs = read_inputs(folder)
    writer = EventWriter(events, inputs.job_id)
    loop: Loop | None = None
    started_at = time.monotonic()
    try:
        job = read_job(folder, inputs)
        loop = assemble(job, writer, stop, started_at)
        loop.run()
        writer.emit(loop.write_result(started_at))
    except StoppedError:
        writer.emit(StoppedEvent(job_id=writer.job_id, step=loop.progress.step if loop else 0))
    except (LuthierError, OSError, SafetensorError, MemoryError, RuntimeError) as error:
        failure = _find_failure(error, loop)
        if failure is None:
            raise
        writer.emit(
            FailedEvent(
                job_id=writer.job_id,
                code=failure.code or "server_error",
                message=failure.message,
                param=failure.param,
                is_retryable=failure.retryable,
            )
        )
        return False
    return True


def _find_failure(error: Exception, loop: Loop | None) -> LuthierError | None:
    """Return the failure that a user sees; None for an error of the code itself."""
    if isinstance(error, LuthierError):
        return error
    if _is_disk_full(error):
        return StorageFullError(
            "The worker's disk is full, or its quota is used up. The job continues from its last save "
            "point once there is room."
        )
    if not isinstance(error, MemoryError | RuntimeError) or not is_out_of_memory(error):
        return None
    if loop is None:
        return OutOfMemoryError(
            "The device has too little memory to load this base. Use a smaller base, or a worker with more."
        )
    # It ran out outside of a step's micro-batches, which are halved.
    return out_of_memory(
        loop.job.origin,
        loop.machine,
        num_rows=0,
        longest=0,
        what="The model, with what is trained and its optimizer,",
    )


def _is_disk_full(error: Exception) -> bool:
    """Whether an error means that nothing more can be written; safetensors only says so in its text."""
    if isinstance(error, OSError):
        return error.errno in _DISK_FULL
    is_of_file = isinstance(error, SafetensorError)
    return is_of_file and any(f"(os error {number})" in str(error) for number in _DISK_FULL)
