"""From a run directory to a loop that is ready: base, method, optimizer, and the state of a save point."""

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from luthier.core.cost_model import max_part_tokens
from luthier.core.errors import InvalidValueError, LuthierError
from luthier.core.events import Evaluation, StartedEvent
from luthier.data.rendering.tokenizer import Tokenizer
from luthier.methods import Attached, MethodParams, Start
from luthier.methods._tuning import parse_tuning
from luthier.modeling.load import load_base
from luthier.modeling.training_protocols import Batch
from luthier.training.job import Job
from luthier.training.loop.evaluation import Evaluator, general_rows
from luthier.training.loop.gradient_accumulation import GradientAccumulator
from luthier.training.loop.loop import Loop
from luthier.training.loop.run_stats import Progress
from luthier.training.loop.sample_answers import SamplePrompts
from luthier.training.model.batches import collate, row_lengths
from luthier.training.model.continuation import (
    check_parent,
    ground_folder,
    take_parents_weights,
    verify_start,
)
from luthier.training.model.device import Machine, choose_machine
from luthier.training.model.dpo import Preferences, reference_log_likelihoods
from luthier.training.model.optimizer import build_optimizer, start_master_weights
from luthier.training.model.training_model import JobModel, Untuned
from luthier.training.output.artifact import LOG_NAME, TrainingLog
from luthier.training.output.checkpoints import Publisher
from luthier.training.output.resume_state import SavePoints
from luthier.training.process_io import EventWriter, StopRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NUM_SAMPLE_TOKENS = 32
# Tokens of the longest row: beyond the length at which the fast path computes attention in another way.
_NUM_LONG_SAMPLE_TOKENS = 512
# Rows that a method may take its first values from.
_NUM_EXAMPLES = 64


def assemble(job: Job, writer: EventWriter, stop: StopRequest, started_at: float) -> Loop:
    """Load the base, attach the method, put back a save point.

    Raises:
        UnsuitableParentError: when the job can't continue what its run directory has.
    """
    spec, inputs = job.spec, job.origin.inputs
    check_parent(job)
    save_points = SavePoints(job.folder / "save_points", job.fingerprint)
    found = save_points.find(lambda text: writer.say(text, "warn"))
    progress = Progress() if found is None else found.progress
    machine = choose_machine(
        inputs.device, spec.training.precision, spec.num_threads or 1, begun_in=progress.precision
    )
    progress.precision = machine.precision
    tokenizer = Tokenizer.load(Path(inputs.base_path))
    method, params = parse_tuning(spec.tuning)
    base, ground = Path(inputs.base_path), ground_folder(job, method)
    has_base_to_score = spec.parent is not None and progress.step == 0
    load = partial(load_base, dtype=machine.dtype, device=machine.device)
    causal_lm = load(base if has_base_to_score else ground)
    pad_id = _pad_id(causal_lm.config)
    samples = _samples(job, pad_id)
    evaluator = _evaluator(job, machine, tokenizer, pad_id, stop, writer, room=_room(job, params))
    progress.add_seconds("load", time.monotonic() - started_at)
    start_evaluation = None
    if has_base_to_score:
        with progress.phase("evaluate"):
            progress.base_evaluation = _evaluate_untuned(causal_lm, evaluator, machine, samples[0])
        if ground != base:
            # One model in memory at a time.
            del causal_lm
            gc.collect()
            with progress.phase("load"):
                causal_lm = load(ground)
    if not spec.takes_parents_weights:
        evaluator = _with_preferences(
            job, evaluator, progress, partial(_untuned, causal_lm, machine, samples[0])
        )
    if progress.step == 0 and not method.starts_as_base and not spec.takes_parents_weights:
        with progress.phase("evaluate"):
            start_evaluation = _evaluate_untuned(causal_lm, evaluator, machine, samples[0])
    attach_began = time.monotonic()
    attached = method.attach(causal_lm, params, _start(job, tokenizer))
    take_parents_weights(job, method, attached)
    model = JobModel(method, attached, machine.device, samples[0])
    verify_start(job, model)
    if spec.takes_parents_weights:
        evaluator = _with_preferences(job, evaluator, progress, lambda: model)
    optimizer = build_optimizer(
        model.parameters,
        learning_rate=job.peak_learning_rate,
        weight_decay=spec.training.weight_decay,
        device=machine.device,
    )
    log = TrainingLog(job.folder / LOG_NAME, progress.log)
    publisher = Publisher(
        job,
        model,
        writer,
        samples=samples,
        general_ids=evaluator.general.row(0)[0].tolist(),
        log=log.path,
    )
    publisher.restore_chosen(None if found is None else found.chosen)
    if found is not None:
        save_points.restore(found, model, optimizer)
        model.verify(samples)
    else:
        start_master_weights(optimizer, attached, ground)
    progress.add_seconds("load", time.monotonic() - attach_began)
    _report_started(job, writer, model, machine, progress, time.monotonic() - started_at)
    return Loop(
        job,
        model,
        optimizer=optimizer,
        save_points=save_points,
        publisher=publisher,
        accumulator=GradientAccumulator(
            job,
            model,
            machine,
            writer,
            progress,
            pad_id=pad_id,
            max_tokens=progress.max_part_tokens or max_part_tokens(job.origin.base, machine.device),
            preferences=evaluator.preferences,
        ),
        evaluator=evaluator,
        writer=writer,
        stop=stop,
        progress=progress,
        machine=machine,
        log=log,
        start_evaluation=start_evaluation,
    )


def _report_started(
    job: Job, writer: EventWriter, model: JobModel, machine: Machine, progress: Progress, seconds: float
) -> None:
    writer.emit(
        StartedEvent(
            job_id=writer.job_id,
            device=machine.device,
            precision=machine.precision,
            start_step=progress.step,
            total_steps=job.plan.num_steps,
            num_trained_parameters=model.attached.num_trained_parameters,
            load_seconds=seconds,
        )
    )
    if model.path == "fused":
        writer.say("The fast path for this architecture runs; it was compared with the reference path.")


def _start(job: Job, tokenizer: Tokenizer) -> Start:
    """Return what a method's first values may depend on."""
    foundation = job.spec.foundation
    num_examples = min(job.rows.num_rows, _NUM_EXAMPLES)
    return Start(
        seed=job.spec.seed,
        # Loaded onto the base itself an artifact would give wrong answers silently.
        base_id=job.spec.base_id if foundation is None else foundation.name,
        tokenize=tokenizer.encode,
        examples=[job.rows.row(index)[0].tolist() for index in range(num_examples)],
    )


def _room(job: Job, params: MethodParams) -> int:
    """Return the tokens that a row may have, once virtual tokens have taken theirs; refuse longer rows."""
    num_virtual: int = getattr(params, "num_virtual_tokens", 0)
    room = job.origin.base.context_length - num_virtual
    longest = max(int(row_lengths(rows).max()) for rows in (job.rows, job.validation) if rows is not None)
    if longest > room:
        raise InvalidValueError(
            f"The longest row has {longest} tokens, and {num_virtual} virtual tokens leave {room} of the "
            f"base's context. Use fewer, or set training.max_length to {room}.",
            param="tuning.num_virtual_tokens",
        )
    return room


def _evaluator(
    job: Job,
    machine: Machine,
    tokenizer: Tokenizer,
    pad_id: int,
    stop: StopRequest,
    writer: EventWriter,
    *,
    room: int,
) -> Evaluator:
    def should_stop() -> bool:
        # It is asked between all parts, of which there may be many.
        writer.note_progress()
        return stop.is_set

    base = job.origin.base
    prompts = SamplePrompts(
        job.spec.training.sample_prompts,
        Path(job.origin.inputs.base_path),
        tokenizer,
        base.context_length,
        room,
    )
    return Evaluator(
        # Pairs are scored beside what the job starts from (_with_preferences).
        validation=None if job.spec.dpo is not None else job.validation,
        general=general_rows(tokenizer, room),
        prompts=prompts,
        options={
            "max_tokens": max_part_tokens(base, machine.device),
            "pad_id": pad_id,
            "should_stop": should_stop,
        },
    )


def _with_preferences(
    job: Job, evaluator: Evaluator, progress: Progress, make_start: Callable[[], JobModel]
) -> Evaluator:
    """Score all pairs under the model that the job starts from; the evaluator as it is without pairs."""
    dpo = job.spec.dpo
    if dpo is None:
        return evaluator
    if isinstance(dpo.beta, str):
        raise LuthierError('The spec still holds "auto" values; it must be resolved before training.')
    score = partial(reference_log_likelihoods, make_start(), **evaluator.options)
    with progress.phase("evaluate"):
        validation = None if job.validation is None else score(job.validation)
        preferences = Preferences(dpo.beta, score(job.rows), validation)
    return replace(evaluator, validation=job.validation, preferences=preferences)


def _evaluate_untuned(
    causal_lm: "PreTrainedModel", evaluator: Evaluator, machine: Machine, sample: Batch
) -> Evaluation:
    """Score a model before a method that changes it at once is attached."""
    untuned = _untuned(causal_lm, machine, sample)
    return evaluator.evaluate(untuned, step=0, epoch=0.0, loss_before=None)


def _untuned(causal_lm: "PreTrainedModel", machine: Machine, sample: Batch) -> JobModel:
    attached = Attached(model=causal_lm.eval(), causal_lm=causal_lm)
    return JobModel(Untuned(), attached, machine.device, sample)


def _samples(job: Job, pad_id: int) -> list[Batch]:
    """Return the shortest row, cut to a few tokens, and the longest: enough to compare results on."""
    lengths = row_lengths(job.rows)
    samples = []
    for row, num_tokens in (
        (np.argmin(lengths), _NUM_SAMPLE_TOKENS),
        (np.argmax(lengths), _NUM_LONG_SAMPLE_TOKENS),
    ):
        whole = collate(job.rows, np.array([row]), pad_id)
        samples.append(Batch(whole.token_ids_BT[:, :num_tokens], whole.supervised_BT[:, :num_tokens], 0))
    return samples


def _pad_id(config: object) -> int:
    pad = getattr(config, "pad_token_id", None)
    return pad if isinstance(pad, int) else 0
