"""One run, told from start to end: read, load, attach, resume, train, prove, publish."""

import errno
import time
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from luthier.core.errors import LuthierError, OutOfMemoryError, StorageFullError
from luthier.core.events import FailedEvent, FinishedEvent, StartedEvent, StoppedEvent
from luthier.core.specs import BaseFacts
from luthier.data.tokens import Tokenizer
from luthier.methods import Start, parse_tuning
from luthier.modeling.load import load_base
from luthier.training.batches import Batch, collate, row_lengths
from luthier.training.device import Machine, choose_machine
from luthier.training.emit import EventWriter
from luthier.training.evaluate import StoppedError
from luthier.training.job import Job, read_inputs, read_job
from luthier.training.loop import Loop
from luthier.training.optimizer import build_optimizer
from luthier.training.progress import Progress
from luthier.training.report import Ledger
from luthier.training.savepoints import SavePoints
from luthier.training.selfcheck import check_artifact
from luthier.training.signals import StopRequest
from luthier.training.trainee import Trainee

# What the activations of one part of a batch may take, and what one token of one layer takes per hidden
# number, in bytes: measured on Llama shapes in bf16, without checkpointing.
_ACTIVATION_BYTES = {"cpu": 1536 * 1024**2, "cuda": 16 * 1024**3}
_BYTES_PER_TOKEN_LAYER_HIDDEN = 60
_NUM_SAMPLE_TOKENS = 32
# Rows that a method may take its first values from.
_NUM_EXAMPLES = 64
# The longest row's part in a proof: beyond the length at which the fast path attends in another way.
_NUM_LONG_SAMPLE_TOKENS = 512

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


def run(folder: Path, events: int, stop: StopRequest) -> bool:
    """Train what a run directory asks for; tell it all in events.

    Args:
        folder: the run directory.
        events: descriptor for the event lines.
        stop: set by TERM.

    Returns:
        True when the run finished or was stopped, False when it failed (after a `failed` event).
    """
    inputs = read_inputs(folder)
    writer = EventWriter(events, inputs.job_id)
    loop: Loop | None = None
    started_at = time.monotonic()
    try:
        job = read_job(folder, inputs)
        loop = _prepare(job, writer, stop, started_at)
        loop.run()
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
                "The worker's disk is full, or its quota is used up. The job goes on from its last save "
                "point once there is room."
            ),
        )
        return False
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        _fail(
            writer,
            OutOfMemoryError(
                "The device has too little memory for this job. Use a smaller batch_size, a smaller "
                "training.max_length, or a smaller base."
            ),
        )
        return False
    return True


def _prepare(job: Job, writer: EventWriter, stop: StopRequest, started_at: float) -> Loop:
    """Load the base, attach the method, put back a save point."""
    spec, inputs = job.spec, job.origin.inputs
    save_points = SavePoints(job.folder / "save_points", job.fingerprint)
    found = save_points.find(lambda text: writer.say(text, "warn"))
    progress = Progress() if found is None else found.progress
    machine = choose_machine(
        inputs.device, spec.training.precision, spec.num_threads or 1, begun_in=progress.precision
    )
    causal_lm = load_base(Path(inputs.base_path), dtype=machine.dtype, device=machine.device)
    method, params = parse_tuning(spec.tuning)
    attached = method.attach(causal_lm, params, _start(job, Tokenizer.load(Path(inputs.base_path))))
    pad_id = _pad_id(causal_lm.config)
    samples = _samples(job, pad_id)
    trainee = Trainee(method, attached, machine.device, samples[0])
    optimizer = build_optimizer(
        trainee.parameters,
        learning_rate=job.peak_learning_rate,
        weight_decay=spec.training.weight_decay,
        device=machine.device,
    )
    if found is not None:
        save_points.restore(found, trainee, optimizer)
        trainee.prove_shortcuts(samples)
    writer.emit(
        StartedEvent(
            job_id=inputs.job_id,
            device=machine.device,
            precision=machine.precision,
            start_step=progress.step,
            total_steps=job.plan.num_steps,
            num_trained_parameters=attached.num_trained_parameters,
            load_seconds=time.monotonic() - started_at,
        )
    )
    if trainee.path == "fused":
        writer.say("The fast path for this architecture runs; it was compared with the plain one.")
    ledger = Ledger(progress, machine.device)
    return Loop(
        job,
        trainee,
        optimizer=optimizer,
        save_points=save_points,
        writer=writer,
        stop=stop,
        progress=progress,
        machine=machine,
        ledger=ledger,
        max_tokens=_max_tokens(job.origin.base, machine),
        pad_id=pad_id,
        samples=samples,
    )


def _finish(loop: Loop, writer: EventWriter, started_at: float) -> None:
    """Write the artifact, prove it, and only then say that the run is done."""
    job, folder = loop.job, loop.job.folder / "artifact"
    manifest = loop.write_result(folder)
    check_artifact(loop.trainee, folder, loop.samples[0])
    writer.emit(
        FinishedEvent(
            job_id=writer.job_id,
            step=loop.step,
            path=folder.name,
            digest=manifest.digest,
            metrics=loop.last_metrics,
            trained_tokens=int(row_lengths(job.rows).sum()) * job.plan.num_epochs,
            num_trained_parameters=loop.trainee.attached.num_trained_parameters,
            seconds=time.monotonic() - started_at,
            report=loop.report(manifest),
        )
    )


def _start(job: Job, tokenizer: Tokenizer) -> Start:
    """Return what a method's first values may depend on."""
    num_examples = min(job.rows.num_rows, _NUM_EXAMPLES)
    return Start(
        seed=job.spec.seed,
        base_id=job.spec.base_id,
        tokenize=tokenizer.encode,
        examples=[job.rows.row(index)[0].tolist() for index in range(num_examples)],
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


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; the CPU's allocator only says so in its text."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "DefaultCPUAllocator: can't allocate memory" in str(error)


def _is_disk_full(error: BaseException) -> bool:
    """Whether an error means that nothing more can be written; safetensors only says so in its text."""
    if isinstance(error, OSError):
        return error.errno in _DISK_FULL
    return any(f"(os error {number})" in str(error) for number in _DISK_FULL)


def _max_tokens(base: BaseFacts, machine: Machine) -> int:
    """Return the padded tokens of one part; decided by base and kind of device alone, so resumes agree."""
    per_token = base.num_layers * base.hidden_size * _BYTES_PER_TOKEN_LAYER_HIDDEN
    return max(256, min(16384, _ACTIVATION_BYTES[machine.device] // per_token))


def _samples(job: Job, pad_id: int) -> list[Batch]:
    """Return the shortest row, cut to a few tokens, and the longest: enough to compare results on."""
    lengths = row_lengths(job.rows)
    shortest = _cut(job, int(np.argmin(lengths)), _NUM_SAMPLE_TOKENS, pad_id)
    return [shortest, _cut(job, int(np.argmax(lengths)), _NUM_LONG_SAMPLE_TOKENS, pad_id)]


def _cut(job: Job, row: int, num_tokens: int, pad_id: int) -> Batch:
    batch = collate(job.rows, np.array([row]), pad_id)
    return Batch(batch.token_ids_BT[:, :num_tokens], batch.supervised_BT[:, :num_tokens], 0)


def _pad_id(config: object) -> int:
    pad = getattr(config, "pad_token_id", None)
    return pad if isinstance(pad, int) else 0
