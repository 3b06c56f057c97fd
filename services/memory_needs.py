"""What a prepared job needs of its device's memory: by a machine's calibration, else roughly by its sizes."""

from dataclasses import dataclass
from pathlib import Path

from luthier.core.shapes import read_shape
from luthier.core.specs import BaseFacts, TrainingSpec
from luthier.data.count import RowCounts
from luthier.methods import parse_tuning
from services.calibrations import Measured
from services.estimates import estimate

# Without a calibration: a training process with its libraries; what a weight takes in float32 and in the fast
# path's copy, and in the smallest type; a trained number with its gradient and averages; as
# luthier.training.memory has it, a token's activations by layer and hidden number, here in float32, and what
# those of one part of a batch are held below.
_PROCESS_BYTES = 500_000_000
_BYTES_PER_WEIGHT, _LEAST_BYTES_PER_WEIGHT = 8, 2
_BYTES_PER_TRAINED = 16
_BYTES_PER_TOKEN_LAYER_HIDDEN = 120
_MAX_ACTIVATION_BYTES = 1536 * 1024**2


@dataclass(frozen=True)
class MemoryNeed:
    """Of a training process: what it takes at its peak, and what it can't do with less than."""

    peak_bytes: int
    least_bytes: int


def tell_need(
    spec: TrainingSpec,
    *,
    base: BaseFacts,
    base_folder: Path,
    training: RowCounts,
    validation: RowCounts | None,
    measured: Measured | None,
) -> MemoryNeed:
    """Tell what a job's training process needs.

    Args:
        base_folder: where it lies.
        training: of the rows to train on, or a sample with the longest ones.
        validation: of the rows to score, if there are any.
        measured: what the machine measured of the base, if it did.

    Returns:
        Its bytes. A rough number is no reason to refuse a job, so that without a calibration the least is
        what the base's weights take.
    """
    shape = read_shape(base_folder)
    told = estimate(
        spec,
        base=base,
        shape=shape,
        base_folder=base_folder,
        training=training,
        validation=validation,
        measured=measured,
        reason="",
        memory_bytes=None,
    )
    if told.peak_memory_bytes is not None:
        return MemoryNeed(told.peak_memory_bytes, told.peak_memory_bytes)
    method, params = parse_tuning(spec.tuning)
    num_trained = method.cost(params, shape).num_parameters
    batch_size = spec.hyperparameters.batch_size
    assert isinstance(batch_size, int), "a prepared job's spec is resolved"
    longest = training.lengths.max(initial=0)
    per_token = base.num_layers * base.hidden_size * _BYTES_PER_TOKEN_LAYER_HIDDEN
    activations = min(_MAX_ACTIVATION_BYTES, int(longest) * batch_size * per_token)
    weights = _BYTES_PER_WEIGHT * base.num_parameters
    peak = _PROCESS_BYTES + weights + _BYTES_PER_TRAINED * num_trained + activations
    return MemoryNeed(peak, _LEAST_BYTES_PER_WEIGHT * base.num_parameters)
