"""One run from start to end: read, build, train, verify, publish, or report why not."""

import errno
import time
from pathlib import Path

from safetensors import SafetensorError

from luthier.core.errors import LuthierError, OutOfMemoryError, StorageFullError
from luthier.core.events import FailedEvent, FinishedEvent, StoppedEvent
from luthier.training.build import assemble
from luthier.training.job import read_inputs, read_job
from luthier.training.loop.loop import RESULT_NAME, Loop
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
        loop, start_evaluation = assemble(job, writer, stop, started_at)
        loop.run(start_evaluation)
        _finish(loop, writer, started_at)
    except StoppedError:
        writer.emit(StoppedEvent(job_id=inputs.job_id, step=loop.step if loop else 0))
    except LuthierError as error:
        _fail(writer, error)
        return False
    except (OSError, SafetensorError) as error:
        if not _is_disk_full(error):
            raise
        _fail(
            writer,
            StorageFullError(
                "The worker's disk is full, or its quota is used up. The job continues from its last save "
                "point once there is room."
            ),
        )
        return False
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _fail(writer, _out_of_memory(loop))
        return False
    return True


def _finish(loop: Loop, writer: EventWriter, started_at: float) -> None:
    """Write the result, prove it, and only then say that the run is done."""
    step, metrics, manifest = loop.write_result()
    writer.emit(
        FinishedEvent(
            job_id=writer.job_id,
            step=step,
            path=RESULT_NAME,
            digest=manifest.digest,
            metrics=metrics,
            trained_tokens=loop.stats.tokens_seen,
            num_trained_parameters=loop.model.attached.num_trained_parameters,
            seconds=time.monotonic() - started_at,
            report=loop.report(is_finished=True),
        )
    )


def _fail(writer: EventWriter, error: LuthierError) -> None:
    writer.emit(
        FailedEvent(
            job_id=writer.job_id,
            code=error.code or "server_error",
            message=error.message,
            param=error.param,
            is_retryable=error.retryable,
        )
    )


def _out_of_memory(loop: Loop | None) -> OutOfMemoryError:
    """Say that memory ran out outside the parts of a step, which halve themselves."""
    if loop is None:
        return OutOfMemoryError(
            "The device has too little memory to load this base. Use a smaller base, or a worker with more."
        )
    return out_of_memory(
        loop.job.origin,
        loop.machine,
        num_rows=0,
        longest=0,
        what="The model, with what is trained and its optimizer,",
    )


def _is_disk_full(error: BaseException) -> bool:
    """Whether an error means that nothing more can be written; safetensors only says so in its text."""
    if isinstance(error, OSError):
        return error.errno in _DISK_FULL
    return any(f"(os error {number})" in str(error) for number in _DISK_FULL)
