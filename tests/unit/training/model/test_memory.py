"""How much a run needs and how much there is, in bytes."""

from pathlib import Path

import pytest
import torch

from luthier.bases.catalogue import FACTS_NAME
from luthier.core.cost_model import max_part_tokens
from luthier.core.shapes import read_shape
from luthier.core.specs import BaseFacts, RunInputs, TrainingSpec
from luthier.training.model.device import Machine, available_bytes, out_of_memory
from luthier.training.output.artifact import Origin
from services.capacity.estimates import need_memory
from tests.tiny import build_tiny_base, build_tiny_run, make_facts

FACTS = make_facts(context_length=8192, num_parameters=134_515_008, num_layers=30, hidden_size=576)
FLOAT32 = Machine(device="cpu", dtype=torch.float32)


def test_a_part_is_bounded_by_base_and_kind_of_device_alone():
    assert max_part_tokens(FACTS, "cpu") == 1553
    huge = FACTS.model_copy(update={"num_layers": 80, "hidden_size": 8192})
    assert max_part_tokens(huge, "cpu") == 256


def test_there_is_what_this_process_has_and_what_is_left():
    total = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal:")
    )
    # A library that two processes share counts in both.
    assert 10 * 1024**2 < available_bytes(FLOAT32) <= 1.05 * total


@pytest.mark.parametrize(
    "tuning", [{"type": "lora", "rank": 4}, {"type": "prompt", "num_virtual_tokens": 100}], ids=str
)
def test_the_error_names_the_need_of_the_estimate(tmp_path, tuning):
    base = build_tiny_base(tmp_path / "base")
    hyperparameters = {"n_epochs": 1, "batch_size": 64}
    run = build_tiny_run(tmp_path / "run", base, tuning=tuning, hyperparameters=hyperparameters)
    spec = TrainingSpec.model_validate_json((run / "spec.json").read_text())
    facts = BaseFacts.model_validate_json((base / FACTS_NAME).read_text())
    origin = Origin(RunInputs(job_id="j", model_name="m", base_path=str(base)), spec, facts)
    need = need_memory(
        spec, base=facts, shape=read_shape(base), longest=90, device="cpu", precision="float32"
    )
    # What rows and virtual tokens add shows in the unit of the message.
    assert need.peak_bytes - need.least_bytes > 20 * 1024**2
    for num_rows, expected in ((1, need.least_bytes), (64, need.peak_bytes)):
        error = out_of_memory(origin, FLOAT32, num_rows=num_rows, longest=90, what="Step 1")
        assert error.code == "out_of_memory"
        text = f"Step 1 does not fit into memory: about {expected / 1024**2:,.0f} MiB are needed"
        assert text in error.message
