"""The cost of a job: bytes by one formula, seconds by a prior that finished jobs correct. Pure arithmetic.

The prior rests on one measured number of a device, the speed of its matrix products. Each phase of it is then
multiplied by what finished jobs on that base and device took beside their own prior. No torch, no database.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from luthier.core.events import PhaseSeconds
from luthier.core.shapes import BaseShape
from luthier.core.specs import BaseFacts, Frozen

NUMBER_BYTES = {"float32": 4, "bfloat16": 2}

# Share of a product's speed that a training step and a pass without gradients reach: between what was
# measured where products ran at 640 and at 921 GFLOP/s (python -m benchmarks.estimate).
_EFFICIENCY = 0.78
# Operations a weight and token: forward, through frozen weights backward, and with gradients of
# the weights (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
_FORWARD, _FROZEN, _TRAINED = 2, 4, 6
# Imports and attaching; bytes a second of reading, of an optimizer's step, and of writing with hashes.
_LOAD_SECONDS, _READ_BYTES, _STEP_BYTES, _WRITE_BYTES = 1.9, 1e9, 30e9, 1e9
# Tokens of the general text, of what a checkpoint is verified on, and of an answer, where a token alone
# takes as long as some forty together.
_GENERAL_TOKENS, _VERIFIED_TOKENS, _ANSWER_TOKENS = 2600, 1500, 64 * 40
# Jobs of which the median counts.
_MAX_JOBS = 5

# Bytes of a training process before the base is read: on a CPU its libraries and first steps, on a GPU the
# context.
_PROCESS_BYTES = {"cpu": 610_000_000, "cuda": 500_000_000}
# Kept for the backward pass by token, layer and hidden number in bfloat16, with LoRA on all linear layers: of
# Llama as an accelerator of the CPU computes it, and of any base by transformers and PEFT.
_FUSED_BYTES, _REFERENCE_BYTES = 24, 90
# Logits held at a time (luthier.modeling.head_loss), and tokens on which a checkpoint is verified.
_CHUNK_LOGITS = 12 * 1024 * 1024
_MAX_VERIFIED_TOKENS = 512
# What the activations of one micro-batch may take, by 60 bytes a token, layer and hidden number.
_ACTIVATION_BYTES = {"cpu": 1536 * 1024**2, "cuda": 16 * 1024**3}
_BYTES_PER_TOKEN_LAYER_HIDDEN = 60


@dataclass(frozen=True)
class MethodCost:
    """A method's own part of a cost, by formula.

    `num_parameters` are trained, `num_saved` are in an artifact. `num_virtual_tokens` run before each row as
    tokens do, `num_virtual_keys` are only seen by them. `is_fused`: an accelerator of the CPU
    can run it on a Llama.
    """

    num_parameters: int
    num_saved: int
    num_virtual_tokens: int = 0
    num_virtual_keys: int = 0
    is_fused: bool = True


class DeviceSpeed(Frozen):
    """What a worker measured of its device: the speed of a matrix product, in operations a second by type.

    `precision` is the type that "auto" becomes there.
    """

    device: str
    num_threads: int
    precision: str
    product_flops: dict[str, float]


@dataclass(frozen=True)
class Work:
    """What a job does, or has done. Tokens are of all epochs, `num_scored_tokens` of one evaluation.

    `num_reference_tokens` are scored once by what a job with preferences starts from.
    """

    is_whole_model: bool
    num_tokens: int
    num_supervised_tokens: int
    num_steps: int
    num_epochs: int
    num_evaluations: int
    num_scored_tokens: int
    num_prompts: int
    num_reference_tokens: int
    num_parameters: int
    artifact_bytes: int


@dataclass(frozen=True)
class FinishedJob:
    """A job that succeeded: what it did, and the seconds that it took."""

    method: str
    has_pairs: bool
    work: Work
    seconds: PhaseSeconds


def predict_seconds(
    work: Work,
    *,
    method: str,
    has_pairs: bool,
    shape: BaseShape,
    flops: float,
    finished: Sequence[FinishedJob],
) -> PhaseSeconds:
    """Predict the seconds of each phase, without tokenising.

    Args:
        flops: the device's product speed, or any number where `finished` is not empty: it cancels out.
        finished: jobs on the same base, device and type, the newest first; those of the same method count
            alone where there are any.
    """
    alike = [job for job in finished if (job.method, job.has_pairs) == (method, has_pairs)]
    counted = (alike or finished)[:_MAX_JOBS]
    prior = _prior(work, shape, flops).model_dump()
    before = [(job.seconds.model_dump(), _prior(job.work, shape, flops).model_dump()) for job in counted]
    factors = {
        phase: statistics.median(
            taken[phase] / expected[phase] for taken, expected in before if expected[phase]
        )
        for phase in prior
        if any(expected[phase] for _, expected in before)
    }
    return PhaseSeconds(**{phase: seconds * factors.get(phase, 1.0) for phase, seconds in prior.items()})


def _prior(work: Work, shape: BaseShape, flops: float) -> PhaseSeconds:
    head = shape.hidden_size * shape.vocabulary_size
    body = sum(inputs * outputs for inputs, outputs in shape.linear_shapes.values())
    speed = _EFFICIENCY * flops
    per_weight = _TRAINED if work.is_whole_model else _FROZEN
    step = per_weight * (body * work.num_tokens + head * work.num_supervised_tokens) / speed
    # Parameter, gradient and two averages are read, three of them written.
    update = work.num_steps * work.num_parameters * 28 / _STEP_BYTES
    pass_seconds = _FORWARD * (body + head) / speed
    scored = _GENERAL_TOKENS + work.num_scored_tokens + work.num_prompts * _ANSWER_TOKENS
    written = (work.num_epochs + 1) * work.artifact_bytes / _WRITE_BYTES
    return PhaseSeconds(
        load=_LOAD_SECONDS + 2 * shape.num_parameters / _READ_BYTES,
        train=step + update,
        evaluate=pass_seconds * (work.num_evaluations * scored + work.num_reference_tokens),
        save=pass_seconds * (work.num_epochs + 1) * _VERIFIED_TOKENS + written,
    )


def max_part_tokens(base: BaseFacts, device: str) -> int:
    """Return the padded tokens of one micro-batch; by base and kind of device alone, so resumes agree."""
    per_token = base.num_layers * base.hidden_size * _BYTES_PER_TOKEN_LAYER_HIDDEN
    return max(256, min(16384, _ACTIVATION_BYTES[device] // per_token))


def peak_bytes(
    cost: MethodCost,
    shape: BaseShape,
    *,
    device: str,
    precision: str,
    is_whole_model: bool,
    num_tokens: int,
    longest: int,
) -> int:
    """Return the most memory that a training process has at once.

    Weights, trained parameters with gradients and optimizer, activations of the largest micro-batch, and what
    the process has beside them.

    Args:
        num_tokens: padded tokens of the largest micro-batch.
        longest: tokens of the longest row.
    """
    size = NUMBER_BYTES[precision]
    weights = shape.num_parameters * size
    head = shape.hidden_size * shape.vocabulary_size * size
    kept = _FUSED_BYTES if device == "cpu" and shape.is_llama and cost.is_fused else _REFERENCE_BYTES
    activations = num_tokens * shape.num_layers * shape.hidden_size * kept * size // 2
    activations += 2 * min(num_tokens * shape.vocabulary_size, _CHUNK_LOGITS) * size
    # Two averages and the gradient, beside an adapter's float32 parameters or the rest of a weight's master.
    trained = cost.num_parameters * (12 if is_whole_model else 16)
    # Logits of two passes with float32 copies and difference; of a whole model the saved one read again.
    verified = min(longest, _MAX_VERIFIED_TOKENS) * shape.vocabulary_size * (2 * size + 8)
    again = max(verified, cost.num_saved * size) if is_whole_model else verified
    return _PROCESS_BYTES[device] + weights + trained + activations + max(head, again)
