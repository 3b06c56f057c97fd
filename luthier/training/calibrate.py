"""`python -P -m luthier.training --calibrate …`: what training costs on a base here, measured in two seconds.

Every variant of every method trains a few parts of batches on a cut copy of the base, through the code
that jobs run. Differences tell what a layer, a token and a supervised token cost, beside what a part costs
at all. The answer is one line of JSON, a `Calibration`.
"""

import os
import tempfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.numpy import save_file

from luthier.bases.catalogue import FACTS_NAME
from luthier.core.estimates import Calibration
from luthier.core.shapes import read_shape
from luthier.core.specs import BaseFacts, Precision
from luthier.data.tokens import Tokenizer
from luthier.methods import Start
from luthier.modeling.load import load_base
from luthier.storage.manifests import seal_folder

# What a run imports before its clock starts, so that what it imports later is measured here too.
from luthier.training import assemble as _run_imports  # noqa: F401
from luthier.training.calibrate_probe import (
    begin_peak,
    has_compiled,
    random_batch,
    resident_bytes,
    seconds_of,
)
from luthier.training.calibrate_variants import (
    FEW_ROWS,
    REFERENCE,
    Bench,
    Clock,
    make_batches,
    measure_variants,
)
from luthier.training.device import Machine, choose_machine, peak_memory_bytes
from luthier.training.general_text import general_rows
from luthier.training.memory import max_part_tokens

if TYPE_CHECKING:
    pass

_WRITTEN_BYTES = 16 * 1024**2


def calibrate(
    folder: Path, *, device: str, precision: Precision, num_threads: int, skipped: Collection[str] = ()
) -> Calibration:
    """Measure a base on this machine.

    Args:
        device: `auto`, `cpu` or `cuda`.
        precision: as a job asks for it.

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
    clock = Clock(machine.device, num_threads)
    bench = Bench(
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
        **make_batches(shape.vocabulary_size, facts.context_length, FEW_ROWS),
    )
    found = measure_variants(bench, skipped)
    return Calibration(
        device=machine.device,
        precision=machine.precision,
        num_threads=num_threads,
        max_part_tokens=max_part_tokens(facts, machine),
        bytes_per_number=machine.dtype.itemsize,
        reference=REFERENCE,
        import_seconds=import_seconds,
        peft_seconds=peft_seconds,
        read_seconds=read_seconds,
        first_forward_seconds=first_forward,
        first_backward_seconds=first_backward,
        written_byte_seconds=_written_byte_seconds(),
        imports_bytes=imports_bytes if machine.device == "cpu" else 0,
        # The kernel counts a peak some pages late.
        loaded_bytes=max(loaded, resident),
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


def _written_byte_seconds() -> float:
    """Return the seconds that a byte takes to be written, hashed and made durable."""
    with tempfile.TemporaryDirectory(prefix="luthier-calibrate-") as folder:
        building = Path(folder) / "building"
        began = time.perf_counter()
        building.mkdir()
        save_file({"numbers": np.zeros(_WRITTEN_BYTES // 4, np.float32)}, building / "numbers.safetensors")
        seal_folder(building, Path(folder) / "sealed")
        return (time.perf_counter() - began) / _WRITTEN_BYTES


def write_calibration(arguments: list[str], descriptor: int) -> None:
    """Calibrate as a command line asks, and write the answer as one line.

    Args:
        arguments: the base's folder, device, precision, threads, and variants that were measured before.
        descriptor: where the line goes.
    """
    folder, device, precision, num_threads, *skipped = arguments
    found = calibrate(
        Path(folder),
        device=device,
        precision=precision,  # type: ignore[arg-type]
        num_threads=int(num_threads),
        skipped=skipped,
    )
    line = found.model_dump_json().encode() + b"\n"
    while line:
        line = line[os.write(descriptor, line) :]
