"""How much a run needs and how much there is, in bytes."""

from pathlib import Path

import torch

from luthier.core.cost_model import max_part_tokens
from luthier.core.specs import BaseFacts
from luthier.training.device import Machine
from luthier.training.memory import needed_bytes, out_of_memory, there_is_bytes

FACTS = BaseFacts(
    id="smollm2-135m-instruct",
    source="hf:none",
    licence="apache-2.0",
    digest="sha256:" + "0" * 64,
    tokenizer_digest="sha256:" + "0" * 64,
    context_length=8192,
    num_parameters=134_515_008,
    num_layers=30,
    hidden_size=576,
)
BFLOAT16 = Machine(device="cpu", dtype=torch.bfloat16)
FLOAT32 = Machine(device="cpu", dtype=torch.float32)


def test_the_need_is_weights_and_what_is_trained_and_activations() -> None:
    weights = 2 * FACTS.num_parameters
    assert needed_bytes(FACTS, BFLOAT16, num_trained=0, num_tokens=0) == weights
    assert needed_bytes(FACTS, FLOAT32, num_trained=0, num_tokens=0) == 2 * weights
    # A float32 number, its gradient and two averages.
    assert needed_bytes(FACTS, BFLOAT16, num_trained=1000, num_tokens=0) == weights + 16_000
    small, large = (needed_bytes(FACTS, BFLOAT16, num_trained=0, num_tokens=n) for n in (500, 1000))
    assert large - weights == 2 * (small - weights) == 60 * 30 * 576 * 1000


def test_a_part_is_bounded_by_base_and_kind_of_device_alone() -> None:
    assert max_part_tokens(FACTS, "cpu") == 1553
    huge = FACTS.model_copy(update={"num_layers": 80, "hidden_size": 8192})
    assert max_part_tokens(huge, "cpu") == 256


def test_there_is_what_this_process_has_and_what_is_left() -> None:
    total = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemTotal:")
    )
    # A library that two processes share counts in both.
    assert 10 * 1024**2 < there_is_bytes(FLOAT32) <= 1.05 * total


def test_the_error_names_need_and_room() -> None:
    error = out_of_memory(FACTS, BFLOAT16, num_trained=0, num_tokens=0, what="The base")
    assert error.code == "out_of_memory"
    assert "The base does not fit into memory: about 257 MiB are needed" in error.message
