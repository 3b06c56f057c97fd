"""`python -P -m luthier.training --calibrate …`: what training costs on a base here, measured in two seconds.

Every variant of every method trains a few parts of batches on a cut copy of the base, through the code
that jobs run. Differences tell what a layer, a token and a supervised token cost, beside what a part costs
at all. The answer is one line of JSON, a `Calibration`.
"""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import save_file

from luthier.bases.catalogue import FACTS_NAME
from luthier.core.estimates import Calibration, VariantConstants
from luthier.core.shapes import BaseShape, read_shape
from luthier.core.specs import BaseFacts, Precision
from luthier.data.tokens import Tokenizer
from luthier.methods import Start, Workload, check_tuning, discover, parse_tuning
from luthier.modeling.load import load_base
from luthier.storage.manifests import seal_folder

# What a run imports before its clock starts, so that what it imports later is measured here too.
from luthier.training import assemble as _run_imports  # noqa: F401
from luthier.training.batches import Batch
from luthier.training.calibrate_probe import (
    Cut,
    begin_peak,
    cut_base,
    has_compiled,
    random_batch,
    resident_bytes,
    seconds_of,
)
from luthier.training.device import Machine, choose_machine, peak_memory_bytes
from luthier.training.general_text import general_rows
from luthier.training.memory import max_part_tokens
from luthier.training.optimizer import build_optimizer
from luthier.training.step import StepScores, apply_gradients, gradient_norm

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_SECONDS = 2.0
# Trains almost nothing, so what others add is told by their difference from it.
_REFERENCE = "prompt"
_NUM_LAYERS = (1, 3)
_ROW_TOKENS, _LONG_ROW_TOKENS = 64, 256
_FEW_ROWS = 1
_NUM_SUPERVISED, _MANY_SUPERVISED = 4, 48
_WRITTEN_BYTES = 16 * 1024**2
_WORKLOAD = (500, 100_000)


class _Clock:
    """The time that a probe has taken: on a CPU, what its threads worked, not what others kept them from.

    Args:
        device: where it runs.
        num_threads: that work.
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
class _Bench:
    """What all measurements share. `few`, `many` and `long` differ in rows and in their length alone."""

    causal_lm: "PreTrainedModel"
    facts: BaseFacts
    shape: BaseShape
    machine: Machine
    start: Start
    few: Batch
    many: Batch
    long: Batch
    scored: Batch
    clock: _Clock

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


def calibrate(folder: Path, *, device: str, precision: Precision, num_threads: int) -> Calibration:
    """Measure a base on this machine.

    Args:
        folder: the fetched base.
        device: `auto`, `cpu` or `cuda`.
        precision: as a job asks for it.
        num_threads: CPU threads.

    Returns:
        The constants; variants for which no time was left are absent.
    """
    machine = choose_machine(device, precision, num_threads)
    facts = BaseFacts.model_validate_json((folder / FACTS_NAME).read_bytes())
    shape, tokenizer = read_shape(folder), Tokenizer.load(folder)
    general = general_rows(tokenizer, facts.context_length)
    import_seconds, peft_seconds = _import_all()
    first_forward, first_backward = _first_seconds(machine)
    imports_bytes = begin_peak(machine.device)
    began = time.perf_counter()
    causal_lm = load_base(folder, dtype=machine.dtype, device=machine.device)
    read_seconds = time.perf_counter() - began
    loaded = peak_memory_bytes(machine.device) - imports_bytes
    begin_peak(machine.device)
    resident = resident_bytes(machine.device) - imports_bytes
    clock = _Clock(machine.device, num_threads)
    bench = _Bench(
        causal_lm=causal_lm,
        facts=facts,
        shape=shape,
        machine=machine,
        start=Start(
            seed=0,
            base_id=facts.id,
            tokenize=tokenizer.encode,
            examples=[general.row(index)[0].tolist() for index in range(min(8, general.num_rows))],
        ),
        clock=clock,
        **_batches(shape.vocabulary_size, facts.context_length, _FEW_ROWS),
    )
    found = _measure(bench)
    return Calibration(
        device=machine.device,
        precision=machine.precision,
        num_threads=num_threads,
        max_part_tokens=max_part_tokens(facts, machine),
        bytes_per_number=machine.dtype.itemsize,
        reference=_REFERENCE,
        import_seconds=import_seconds,
        peft_seconds=peft_seconds,
        read_seconds=read_seconds,
        first_forward_seconds=first_forward,
        first_backward_seconds=first_backward,
        written_byte_seconds=_written_byte_seconds(),
        imports_bytes=imports_bytes if machine.device == "cpu" else 0,
        loaded_bytes=loaded,
        resident_bytes=resident,
        general_lengths=[int(length) for length in general.lengths],
        is_cold=has_compiled(),
        probe_seconds=clock.seconds,
        **found,
    )


def _import_all() -> tuple[float, float]:
    """Import what loading a base and attaching PEFT's methods import; return the seconds of each."""
    began = time.perf_counter()
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    _ = (AutoModelForCausalLM, LlamaForCausalLM)
    imported = time.perf_counter()
    import peft

    _ = peft.get_peft_model
    return imported - began, time.perf_counter() - imported


def _first_seconds(machine: Machine) -> tuple[float, float]:
    """Let compiled kernels load, on a tiny model; return the seconds of a first forward and backward pass."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from luthier.methods.base import Attached

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config).to(dtype=machine.dtype, device=machine.device).requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(True)
    from luthier.training.trainee import Trainee
    from luthier.training.untuned import Untuned

    batch = random_batch(2, 16, 8, 64)
    began = time.perf_counter()
    trainee = Trainee(Untuned(), Attached(model=model, causal_lm=model), machine.device, batch)
    forward = time.perf_counter() - began
    loss = trainee.loss(batch).nll_sum
    return forward, seconds_of(loss.backward, machine.device)


def _batches(vocabulary_size: int, context_length: int, num_rows: int) -> dict[str, Batch]:
    """Return the batches of a probe; a base with a short context gets shorter rows."""
    short = min(_ROW_TOKENS, context_length // 8)
    long = min(_LONG_ROW_TOKENS, context_length // 2)
    return {
        "few": random_batch(num_rows, short, _NUM_SUPERVISED, vocabulary_size),
        "many": random_batch(num_rows * 4, short, 1, vocabulary_size),
        "long": random_batch(max(1, num_rows * 4 * short // long), long, _NUM_SUPERVISED, vocabulary_size),
        "scored": random_batch(num_rows, short, min(short - 1, _MANY_SUPERVISED), vocabulary_size),
    }


def _measure(bench: _Bench) -> dict[str, Any]:
    """Measure the reference, then every variant while there is time."""
    probes = {name: tuning for method in discover().values() for name, tuning in method.probes.items()}
    methods = list(discover())
    order = sorted(probes, key=lambda name: (name != _REFERENCE, name not in methods, name))
    constants, shared, reference = _measure_reference(bench, probes[_REFERENCE])
    variants = {_REFERENCE: constants}
    for number, name in enumerate(order[1:], start=1):
        left = PROBE_SECONDS - bench.clock.seconds
        if left <= 0.0:
            break
        until = PROBE_SECONDS - left + left / (len(order) - number)
        variants[name] = _measure_variant(bench, probes[name], reference, until)
    return {"variants": variants, **shared}


@dataclass(frozen=True)
class _Reference:
    """What the other variants are told apart from; seconds per part, bytes beside the layers."""

    part_seconds: float
    head_seconds: float
    pair_seconds: float
    token_bytes: float


def _measure_reference(
    bench: _Bench, tuning: dict[str, Any]
) -> tuple[VariantConstants, dict[str, Any], _Reference]:
    deep, shallow = bench.cut(tuning, _NUM_LAYERS[1]), bench.cut(tuning, _NUM_LAYERS[0])
    num_few, num_many, num_long = (deep.num_tokens(batch) for batch in (bench.few, bench.many, bench.long))
    few = _least(bench, deep, bench.few)
    many = _least(bench, deep, bench.many)
    long = deep.seconds(bench.long)
    few_shallow = _least(bench, shallow, bench.few)
    scored_shallow = _least(bench, shallow, bench.scored)
    layers, gap = deep.num_layers, max(1, deep.num_layers - shallow.num_layers)
    head = _positive(scored_shallow - few_shallow) / _gap(bench.scored, bench.few)
    token_layer = _positive(many - few - _gap(bench.many, bench.few) * head) / (layers * (num_many - num_few))
    pairs = num_long * (bench.long.token_ids_BT.shape[1] - bench.many.token_ids_BT.shape[1])
    expected = many + layers * token_layer * (num_long - num_many) + head * _gap(bench.long, bench.many)
    pair = _positive(long - expected) / (layers * pairs)
    layer = _positive((few - few_shallow) / gap - token_layer * num_few)
    part = _positive(few - layers * (layer + token_layer * num_few) - head * _supervised(bench.few))
    # Only now: the first runs make what stays.
    peaks = [cut.peak_bytes(bench.many) for cut in (shallow, deep)]
    kept = _positive((peaks[1] - peaks[0]) / (gap * num_many))
    token_bytes = _positive(peaks[1] / num_many - layers * kept)
    attach_layer = _positive((deep.attach_seconds - shallow.attach_seconds) / gap)
    parameter, adding = _update_seconds(bench, deep, few)
    constants = VariantConstants(
        path=deep.trainee.path,
        num_token_parameters=0,
        part_seconds=part,
        layer_seconds=layer,
        token_layer_seconds=token_layer,
        head_seconds=head,
        parameter_seconds=parameter,
        adding_seconds=adding,
        attach_layer_seconds=attach_layer,
        token_layer_bytes=kept,
        token_bytes=token_bytes,
    )
    shared = {
        "probe_tokens": num_many,
        "probe_row_tokens": bench.many.token_ids_BT.shape[1] + deep.cost.num_virtual_tokens,
        "pair_seconds": pair,
        "attach_seconds": _positive(deep.attach_seconds - layers * attach_layer),
        **_scoring_seconds(bench, deep, shallow),
    }
    return constants, shared, _Reference(part, head, pair, token_bytes)


def _measure_variant(
    bench: _Bench, tuning: dict[str, Any], reference: _Reference, until: float
) -> VariantConstants:
    deep = bench.cut(tuning, _NUM_LAYERS[1])
    layers, cost = deep.num_layers, deep.cost
    num_few, num_many = deep.num_tokens(bench.few), deep.num_tokens(bench.many)
    few = _least(bench, deep, bench.few, until)
    many = _least(bench, deep, bench.many, until)
    # Only now: the first runs make what stays.
    peak = deep.peak_bytes(bench.many)
    part, head, token_bytes = reference.part_seconds, reference.head_seconds, reference.token_bytes
    beside = 4.0 * cost.num_parameters
    if deep.trains_head:
        shallow = bench.cut(tuning, _NUM_LAYERS[0])
        few_shallow = _least(bench, shallow, bench.few, until)
        scored_shallow = _least(bench, shallow, bench.scored, until)
        first_peak = shallow.peak_bytes(bench.many)
        head = _positive(scored_shallow - few_shallow) / _gap(bench.scored, bench.few)
        gap = max(1, layers - shallow.num_layers)
        part = _positive(few_shallow - shallow.num_layers * (few - few_shallow) / gap)
        part = _positive(part - head * _supervised(bench.few))
        beside = first_peak - shallow.num_layers * (peak - first_peak) / gap - token_bytes * num_many
    keys = cost.num_virtual_keys * reference.pair_seconds * layers
    few, many = few - keys * num_few, many - keys * num_many
    gained = many - few - _gap(bench.many, bench.few) * head
    token_layer = _positive(gained) / (layers * (num_many - num_few))
    own = few - part - head * _supervised(bench.few)
    parameter, adding = _update_seconds(bench, deep, few + keys * num_few)
    whole = bench.shape.num_layers / layers
    return VariantConstants(
        path=deep.trainee.path,
        num_token_parameters=round(cost.num_token_parameters * whole),
        part_seconds=part,
        layer_seconds=_positive(own / layers - token_layer * num_few),
        token_layer_seconds=token_layer,
        head_seconds=head,
        parameter_seconds=parameter,
        adding_seconds=adding,
        attach_layer_seconds=deep.attach_seconds / layers,
        token_layer_bytes=_positive((peak - beside) / num_many - token_bytes) / layers,
        token_bytes=token_bytes,
    )


def _update_seconds(bench: _Bench, cut: Cut, few_seconds: float) -> tuple[float, float]:
    """Return the seconds per trained parameter of an update, and of adding one more part's gradients."""
    trainee = cut.trainee
    # A second part turns gradients into float32, which the first of them pays for.
    second = cut.seconds(bench.few, is_first_part=False)
    adding = _positive(second - few_seconds) / max(1, cut.cost.num_parameters)
    trainee.clear_gradients()
    cut.run(bench.few)
    parameters = [one for one in trainee.parameters if one.grad is not None]
    layers_alone = [one for one in parameters if one.numel() < bench.shape.vocabulary_size * 64] or parameters
    optimizer = build_optimizer(
        layers_alone, learning_rate=0.0, weight_decay=0.0, device=bench.machine.device
    )
    gradients = [one.grad for one in layers_alone]

    def update() -> None:
        norm = gradient_norm([one for one in gradients if one is not None])
        scores = StepScores(0.0, 0.0, norm, 1, 1)
        apply_gradients(trainee, optimizer, scores, learning_rate=0.0, max_grad_norm=1.0)

    # The first one makes the optimizer's state.
    update()
    for parameter, gradient in zip(layers_alone, gradients, strict=True):
        parameter.grad = gradient
    seconds = seconds_of(update, bench.machine.device)
    return seconds / sum(one.numel() for one in layers_alone), adding


@torch.no_grad()
def _scoring_seconds(bench: _Bench, deep: Cut, shallow: Cut) -> dict[str, float]:
    """Measure passes without gradients: on the path that jobs take, on the plain one, token by token."""
    device, layers = bench.machine.device, deep.num_layers
    few, many = (deep.scoring_seconds(batch) for batch in (bench.few, bench.many))
    scored, plain_few = shallow.scoring_seconds(bench.scored), shallow.scoring_seconds(bench.few)
    head = _positive(scored - plain_few) / _gap(bench.scored, bench.few)
    num_few, num_many = deep.num_tokens(bench.few), deep.num_tokens(bench.many)
    per_token = _positive(many - few - head * _gap(bench.many, bench.few)) / (layers * (num_many - num_few))
    trainee = deep.trainee
    token_ids_BT = bench.many.token_ids_BT.to(device)
    plain = seconds_of(lambda: trainee.method.hidden_states(trainee.attached, token_ids_BT), device)
    decoded = [_decode_seconds(cut, device) for cut in (shallow, deep)]
    per_layer = _positive((decoded[1] - decoded[0]) / max(1, layers - shallow.num_layers))
    return {
        "scoring_part_seconds": _positive(few - layers * per_token * num_few),
        "scoring_seconds": per_token,
        "scoring_head_seconds": head,
        "plain_scoring_seconds": plain / (layers * num_many),
        "decode_layer_seconds": per_layer,
        "decode_seconds": _positive(decoded[0] - shallow.num_layers * per_layer),
    }


def _decode_seconds(cut: Cut, device: str) -> float:
    """Return what one token of an answer takes, after the first."""
    from transformers import DynamicCache

    causal_lm, cache = cut.attached.causal_lm, DynamicCache()
    token_ids_BT = torch.zeros((1, 1), dtype=torch.int64, device=device)

    def decode() -> None:
        causal_lm(input_ids=token_ids_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)

    decode()
    return seconds_of(decode, device)


def _written_byte_seconds() -> float:
    """Return the seconds that a byte takes to be written, hashed and made durable."""
    with tempfile.TemporaryDirectory(prefix="luthier-calibrate-") as folder:
        building = Path(folder) / "building"
        began = time.perf_counter()
        building.mkdir()
        save_file({"numbers": np.zeros(_WRITTEN_BYTES // 4, np.float32)}, building / "numbers.safetensors")
        seal_folder(building, Path(folder) / "sealed")
        return (time.perf_counter() - began) / _WRITTEN_BYTES


def _least(bench: _Bench, cut: Cut, batch: Batch, until: float = PROBE_SECONDS) -> float:
    """Return the least of two runs, of one where time is short: other work on the machine only adds to it."""
    found = [cut.seconds(batch)]
    if bench.clock.seconds < until:
        found.append(cut.seconds(batch))
    return min(found)


def _gap(larger: Batch, smaller: Batch) -> int:
    return _supervised(larger) - _supervised(smaller)


def _supervised(batch: Batch) -> int:
    return int(batch.supervised_BT.sum())


def _positive(value: float) -> float:
    """A difference of two noisy measurements may fall below what is possible."""
    return max(0.0, value)


def write_calibration(arguments: list[str], descriptor: int) -> None:
    """Calibrate as a command line asks, and write the answer as one line.

    Args:
        arguments: the base's folder, device, precision, threads.
        descriptor: where the line goes.
    """
    folder, device, precision, num_threads = arguments
    found = calibrate(
        Path(folder),
        device=device,
        precision=precision,  # type: ignore[arg-type]
        num_threads=int(num_threads),
    )
    line = found.model_dump_json().encode() + b"\n"
    while line:
        line = line[os.write(descriptor, line) :]
