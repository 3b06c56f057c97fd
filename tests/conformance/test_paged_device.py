"""What the paged runner costs on a device that is not the CPU: kernels a layer, and blocking reads a step."""

import itertools
import json
import subprocess
import sys

import pytest

Steps = dict[str, list[int]]

LORA, ALL_KINDS = ("lora",), ("lora", "dora", "adapter", "prefix", "prompt")
_CASES = list(itertools.product((LORA, ALL_KINDS), (5, 16), (2, 4)))


@pytest.fixture(scope="module")
def steps() -> list[Steps]:
    """Kernels and blocking reads of each case, by a process that has the device."""
    command = [sys.executable, "-m", "tests.pretend_steps", json.dumps(_CASES)]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


@pytest.mark.parametrize(("kinds", "most"), [(LORA, 80), (ALL_KINDS, 130)])
def test_kernels_do_not_depend_on_the_number_of_adapters(
    steps: list[Steps], kinds: tuple[str, ...], most: int
) -> None:
    few_two, few_four, many_two, many_four = (
        found for case, found in zip(_CASES, steps, strict=True) if case[0] == kinds
    )
    assert (few_two, few_four) == (many_two, many_four)
    for name in ("decode", "mixed"):
        assert 40 < (many_four[name][0] - many_two[name][0]) / 2 <= most


def test_a_step_reads_once_and_once_more_for_logits_or_draws(steps: list[Steps]) -> None:
    for found in steps:
        assert {name: reads for name, (_, reads) in found.items()} == dict.fromkeys(found, 1)
