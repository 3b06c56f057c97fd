"""What every variant of every method costs by layer, token and supervised token, on cut copies of a base."""

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from luthier.core.errors import InvalidValueError
from luthier.core.estimates import VariantConstants
from luthier.core.pricing import KEPT_TOKENS
from luthier.core.shapes import BaseShape
from luthier.core.specs import BaseFacts
from luthier.methods import Start, Workload, check_tuning, discover, parse_tuning
from luthier.training.batches import Batch
from luthier.training.calibrate_probe import Cut, cut_base, random_batch, seconds_of
from luthier.training.device import Machine
from luthier.training.optimizer import build_optimizer
from luthier.training.step import StepScores, apply_gradients, gradient_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_SECONDS = 2.0
# Trains almost nothing, so what others add is told by their difference from it.
REFERENCE = "prompt"
_NUM_LAYERS = (1, 3)
# The second attend as short rows do; the third, in a context that is long enough, as long ones.
_ROW_TOKENS, _MIDDLE_ROW_TOKENS, _LONG_ROW_TOKENS = 64, KEPT_TOKENS, 256
FEW_ROWS = 1
_NUM_SUPERVISED, _MANY_SUPERVISED = 8, 72
_FEW_PARAMETERS = 100_000
_WORKLOAD = (500, 100_000)


class Clock:
    """The time that a probe has taken: on a CPU, what its threads worked, not what others kept them from.

    Args:
        device: where it runs.
    """

    def __init__(self, device: str, num_threads: int) -> None:
        self._read = time.process_time if device == "cpu" else time.perf_counter
        self._num_threads = num_threads if device == "cpu" else 1
        self._began = self._read()

    @property
    def seconds(self) -> float:
        """Seconds so far."""
        return (self._read() - self._began) / self._num_threads


@dataclass(frozen=True)
class Bench:
    """What all measurements share. `few`, `many`, `middle` and `long` differ in rows and in their length
    alone.
    """

    causal_lm: "PreTrainedModel"
    facts: BaseFacts
    shape: BaseShape
    machine: Machine
    start: Start
    few: Batch
    many: Batch
    middle: Batch
    long: Batch
    clock: Clock

    def cut(self, tuning: dict[str, Any], num_layers: int) -> Cut:
        """Put a variant on a copy of some layers."""
        method, params = parse_tuning(check_tuning(tuning))
        num_rows, num_tokens = _WORKLOAD
        params = method.resolve(params, Workload(self.facts, num_rows, num_tokens))
        return Cut(
            cut_base(self.causal_lm, min(num_layers, self.shape.num_layers)),
            method,
            params,
            start=self.start,
            shape=self.shape,
            device=self.machine.device,
            sample=random_batch(1, 8, 4, self.shape.vocabulary_size),
        )


def make_batches(vocabulary_size: int, context_length: int, num_rows: int) -> dict[str, Batch]:
    """Return the batches of a probe; a base with a short context gets shorter rows."""
    short = min(_ROW_TOKENS, context_length // 8)
    middle = min(_MIDDLE_ROW_TOKENS, context_length // 4)
    long = min(_LONG_ROW_TOKENS, context_length // 2)

    def of_length(num_tokens: int) -> Batch:
        num_longer = max(1, num_rows * 4 * short // num_tokens)
        return random_batch(num_longer, num_tokens, _NUM_SUPERVISED, vocabulary_size)

    return {
        "few": random_batch(num_rows, short, _NUM_SUPERVISED, vocabulary_size),
        "many": random_batch(num_rows * 4, short, 1, vocabulary_size),
        "middle": of_length(middle),
        "long": of_length(long),
    }


def measure_variants(bench: Bench, skipped: Collection[str]) -> dict[str, Any]:
    """Measure the reference, then every variant but the skipped ones while there is time."""
    probes = {name: tuning for method in discover().values() for name, tuning in method.probes.items()}
    methods = list(discover())
    wanted = [name for name in probes if name not in skipped or name == REFERENCE]
    order = sorted(wanted, key=lambda name: (name != REFERENCE, name not in methods, name))
    constants, shared, reference = _measure_reference(bench, probes[REFERENCE])
    variants = {REFERENCE: constants}
    for number, name in enumerate(order[1:], start=1):
        left = PROBE_SECONDS - bench.clock.seconds
        if left <= 0.0:
            break
        until = PROBE_SECONDS - left + left / (len(order) - number)
        try:
            variants[name] = _measure_variant(bench, probes[name], reference, until)
        except InvalidValueError:
            # The base has no place for it, and a job is told so when it asks.
            continue
    return {"variants": variants, **shared}


@dataclass(frozen=True)
class _Reference:
    """What the other variants are told apart from.

    Seconds of the output layer, per part and per supervised token, and per pair of tokens in short rows;
    bytes per token that are kept outside the layers, and that are in use for a moment.
    """

    head: tuple[float, float]
    short_pair_seconds: float
    outer_bytes: float
    token_bytes: float


def _measure_reference(
    bench: Bench, tuning: dict[str, Any]
) -> tuple[VariantConstants, dict[str, Any], _Reference]:
    deep, shallow = bench.cut(tuning, _NUM_LAYERS[1]), bench.cut(tuning, _NUM_LAYERS[0])
    layers, gap = deep.num_layers, max(1, deep.num_layers - shallow.num_layers)
    num_many = deep.num_tokens(bench.many)
    kept = (deep.kept_bytes(bench.many) - shallow.kept_bytes(bench.many)) / (gap * num_many)
    outer = max(0.0, shallow.kept_bytes(bench.many) / num_many - shallow.num_layers * kept)
    layer, token_layer = _body_seconds(bench, deep, PROBE_SECONDS)
    short_pair, pair = (
        _pair_seconds(bench, deep, batch, layer, token_layer) for batch in (bench.middle, bench.long)
    )
    token_bytes = max(0.0, deep.peak_bytes(bench.many) / num_many - layers * kept)
    step, parameter = _update_seconds(bench, deep)
    head = _head_seconds(deep, is_scoring=False)
    attach_layer = max(0.0, (deep.attach_seconds - shallow.attach_seconds) / gap)
    constants = VariantConstants(
        path=deep.trainee.path,
        num_token_parameters=0,
        part_seconds=head[0],
        layer_seconds=layer,
        token_layer_seconds=token_layer,
        head_seconds=head[1],
        step_seconds=step,
        parameter_seconds=parameter,
        adding_seconds=0.0,
        attach_layer_seconds=attach_layer,
        attached_layer_bytes=deep.attached_bytes / layers,
        token_layer_bytes=kept,
        token_bytes=token_bytes,
    )
    shared = {
        "probe_tokens": num_many,
        "probe_row_tokens": bench.many.token_ids_BT.shape[1] + deep.cost.num_virtual_tokens,
        "short_pair_seconds": short_pair,
        "pair_seconds": pair,
        "attach_seconds": max(0.0, deep.attach_seconds - layers * attach_layer),
        **_scoring_seconds(bench, deep, shallow),
    }
    return constants, shared, _Reference(head, short_pair, outer, token_bytes)


def _measure_variant(
    bench: Bench, tuning: dict[str, Any], reference: _Reference, until: float
) -> VariantConstants:
    cut = bench.cut(tuning, _NUM_LAYERS[1])
    layers, cost, num_many = cut.num_layers, cut.cost, cut.num_tokens(bench.many)
    kept = cut.kept_bytes(bench.many) / num_many - reference.outer_bytes
    (part, per_supervised), outside, adding = reference.head, 0.0, 0.0
    if cut.trains_head:
        part, per_supervised = _head_seconds(cut, is_scoring=False)
        outside = cut.embedding_seconds(bench.few)
        few = cut.seconds(bench.few)
        # A second part turns gradients into float32, which the first of them pays for.
        adding = max(0.0, cut.seconds(bench.few, is_first_part=False) - few) / cost.num_parameters
    keys = cost.num_virtual_keys * reference.short_pair_seconds
    layer, token_layer = _body_seconds(bench, cut, until, outside=outside)
    step, parameter = _update_seconds(bench, cut)
    return VariantConstants(
        path=cut.trainee.path,
        num_token_parameters=round(cost.num_token_parameters * bench.shape.num_layers / layers),
        part_seconds=part + outside,
        layer_seconds=layer,
        token_layer_seconds=max(0.0, token_layer - keys),
        head_seconds=per_supervised,
        step_seconds=step,
        parameter_seconds=parameter,
        adding_seconds=adding,
        attach_layer_seconds=cut.attach_seconds / layers,
        attached_layer_bytes=cut.attached_bytes / layers,
        token_layer_bytes=max(0.0, kept / layers),
        token_bytes=reference.token_bytes,
    )


def _body_seconds(bench: Bench, cut: Cut, until: float, *, outside: float = 0.0) -> tuple[float, float]:
    """Return the seconds of a layer and part, and of a layer and token; `outside` is left out."""
    few, many = (_least(bench, cut, batch, until) for batch in (bench.few, bench.many))
    num_few, num_many = cut.num_tokens(bench.few), cut.num_tokens(bench.many)
    per_token = max(0.0, many - few) / (cut.num_layers * (num_many - num_few))
    return max(0.0, (few - outside) / cut.num_layers - per_token * num_few), per_token


def _pair_seconds(bench: Bench, cut: Cut, batch: Batch, layer: float, token_layer: float) -> float:
    """Return what a token takes in a layer for every key that it sees beyond those of the probe's rows."""
    num_tokens = cut.num_tokens(batch)
    pairs = num_tokens * (batch.token_ids_BT.shape[1] - bench.many.token_ids_BT.shape[1])
    expected = cut.num_layers * (layer + token_layer * num_tokens)
    return max(0.0, _least(bench, cut, batch) - expected) / (cut.num_layers * pairs)


def _head_seconds(cut: Cut, *, is_scoring: bool) -> tuple[float, float]:
    """Return the seconds of the output layer at all, and of every supervised token."""
    few, many = (
        cut.head_seconds(count, is_scoring=is_scoring) for count in (_NUM_SUPERVISED, _MANY_SUPERVISED)
    )
    per_token = max(0.0, many - few) / (_MANY_SUPERVISED - _NUM_SUPERVISED)
    return max(0.0, few - _NUM_SUPERVISED * per_token), per_token


def _update_seconds(bench: Bench, cut: Cut) -> tuple[float, float]:
    """Return the seconds of an update at all and per trained parameter, of the layers' parameters alone.

    A few parameters take no time for themselves, and many hide what an update takes at all.
    """
    trainee = cut.trainee
    largest = bench.shape.vocabulary_size * 32
    parameters = [one for one in trainee.parameters if one.grad is not None]
    parameters = [one for one in parameters if one.numel() < largest] or parameters
    optimizer = build_optimizer(parameters, learning_rate=0.0, weight_decay=0.0, device=bench.machine.device)
    gradients = [one.grad for one in parameters]

    def update() -> None:
        norm = gradient_norm([one for one in gradients if one is not None])
        scores = StepScores(0.0, 0.0, norm, 1, 1)
        apply_gradients(trainee, optimizer, scores, learning_rate=0.0, max_grad_norm=1.0)

    # The first one makes the optimizer's state.
    update()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad_dtype = None if gradient is None else gradient.dtype
        parameter.grad = gradient
    seconds = seconds_of(update, bench.machine.device)
    num_numbers = sum(one.numel() for one in parameters)
    return (seconds, 0.0) if num_numbers < _FEW_PARAMETERS else (0.0, seconds / num_numbers)


def _scoring_seconds(bench: Bench, deep: Cut, shallow: Cut) -> dict[str, float]:
    """Measure passes without gradients: on the path that jobs take, on the plain one, token by token."""
    device, layers = bench.machine.device, deep.num_layers
    few, many = (deep.scoring_seconds(batch) for batch in (bench.few, bench.many))
    num_few, num_many = deep.num_tokens(bench.few), deep.num_tokens(bench.many)
    per_token = max(0.0, many - few) / (layers * (num_many - num_few))
    part, head = _head_seconds(deep, is_scoring=True)
    plain = deep.scoring_seconds(bench.many, on_plain_path=True)
    decoded = [_decode_seconds(cut, device) for cut in (shallow, deep)]
    per_layer = max(0.0, (decoded[1] - decoded[0]) / max(1, layers - shallow.num_layers))
    return {
        "scoring_part_seconds": part,
        "scoring_layer_seconds": max(0.0, few / layers - per_token * num_few),
        "scoring_seconds": per_token,
        "scoring_head_seconds": head,
        "plain_scoring_seconds": plain / (layers * num_many),
        "decode_layer_seconds": per_layer,
        "decode_seconds": max(0.0, decoded[0] - shallow.num_layers * per_layer),
    }


@torch.no_grad()
def _decode_seconds(cut: Cut, device: str) -> float:
    """Return what one token of an answer takes, after the first."""
    from transformers import DynamicCache

    causal_lm, cache = cut.attached.causal_lm, DynamicCache()
    token_ids_BT = torch.zeros((1, 1), dtype=torch.int64, device=device)

    def decode() -> None:
        causal_lm(input_ids=token_ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)

    decode()
    return seconds_of(decode, device)


def _least(bench: Bench, cut: Cut, batch: Batch, until: float = PROBE_SECONDS) -> float:
    """Return the least of two runs, of one where time is short: other work on the machine only adds to it."""
    found = [cut.seconds(batch)]
    if bench.clock.seconds < until:
        found.append(cut.seconds(batch))
    return min(found)
