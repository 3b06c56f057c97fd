"""Which type "auto" takes, and that a resume keeps it."""

from collections.abc import Iterator

import pytest
import torch

from luthier.core.errors import UnsuitableMachineError
from luthier.training.model import device as device_module
from luthier.training.model.device import choose_machine


@pytest.fixture(autouse=True)
def _settings_of_torch() -> Iterator[None]:
    threads, is_deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(is_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fills


def choose(monkeypatch: pytest.MonkeyPatch, *, gains: bool, begun_in: str | None, asked: str = "auto") -> str:
    monkeypatch.setattr(device_module, "cpu_multiplies_bf16", lambda: gains)
    return choose_machine("cpu", asked, 1, begun_in=begun_in).precision  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gains", "begun_in", "expected"),
    [
        (True, None, "bfloat16"),
        (False, None, "float32"),
        (True, "float32", "float32"),
        (True, "bfloat16", "bfloat16"),
        (False, "float32", "float32"),
    ],
)
def test_auto_takes_bfloat16_where_the_hardware_multiplies_it_and_a_resume_keeps_its_type(
    monkeypatch, gains, begun_in, expected
):
    assert choose(monkeypatch, gains=gains, begun_in=begun_in) == expected


def test_a_machine_that_cannot_keep_it_says_so_and_leaves_the_job_to_another(monkeypatch):
    with pytest.raises(UnsuitableMachineError, match=r"training\.precision") as caught:
        choose(monkeypatch, gains=False, begun_in="bfloat16")
    assert caught.value.retryable
    # A job that asked for the type gets it, however slow.
    assert choose(monkeypatch, gains=False, begun_in="bfloat16", asked="bfloat16") == "bfloat16"


def test_a_gpu_that_only_emulates_bfloat16_trains_in_float32(monkeypatch):
    """As torch answers for a Turing or Volta card, which emulates the type."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    found = choose_machine("cuda", "auto", 1)
    assert (found.device, found.precision) == ("cuda", "float32")
