"""Training on each device: the losses of the CPU, a resume without a jump, and what is measured of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.core.devices import find_device
from luthier.core.events import FinishedEvent, StepEvent, TrainingEvent
from luthier.core.settings import Settings
from luthier.modeling.load import load_base
from luthier.training.model.device import measure_speed
from tests.tiny import build_tiny_run
from tests.training_runs import finished, run_here

METHODS = ("lora", "adapter", "prefix", "prompt", "full")
# Devices add the same numbers in another order.
_SAME_LOSS = {"rel": 2e-3, "abs": 1e-4}


def make_run(folder: Path, base: Path, device: str, **options: Any) -> Path:
    build_tiny_run(folder, base, **options)
    path = folder / "inputs.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"device": device}))
    return folder


def losses(events: list[TrainingEvent]) -> list[float]:
    return [event.metrics.train_loss for event in events if isinstance(event, StepEvent)]


@pytest.mark.parametrize(
    ("device", "method"),
    [("cpu", "lora"), *(pytest.param("cuda", name, marks=pytest.mark.gpu) for name in METHODS)],
    indirect=["device"],
)
def test_a_job_has_the_losses_of_the_cpu_and_its_artifact_is_verified(
    device: str, method: str, base: Path, tmp_path: Path
) -> None:
    expected = losses(run_here(make_run(tmp_path / "cpu", base, "cpu", tuning={"type": method})))
    torch.use_deterministic_algorithms(False)
    # A run that succeeds has loaded its artifact again and compared its logits.
    events = run_here(make_run(tmp_path / "run", base, device, tuning={"type": method}))
    finished(events)
    assert losses(events) == pytest.approx(expected, **_SAME_LOSS)
    assert len(expected) >= 3


def test_a_killed_job_continues_with_the_same_losses(device: str, base: Path, tmp_path: Path) -> None:
    options = {"training": {"save_every_steps": 2}, "hyperparameters": {"n_epochs": 2}}
    whole = losses(run_here(make_run(tmp_path / "whole", base, device, **options)))
    folder = make_run(tmp_path / "killed", base, device, **options)
    first = losses(run_here(folder, kill_after=lambda event: event.type == "save_point"))
    rest = run_here(folder)
    finished(rest)
    assert 0 < len(first) < len(whole)
    assert first + losses(rest) == pytest.approx(whole, **_SAME_LOSS)


def test_the_report_names_the_peak_of_the_devices_memory(device: str, base: Path, tmp_path: Path) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    event: FinishedEvent = finished(run_here(make_run(tmp_path / "run", base, device)))
    weights = sum(
        parameter.nbytes for parameter in load_base(base, dtype=torch.float32, device="cpu").parameters()
    )
    assert event.report.peak_memory_bytes > weights


def test_a_base_is_loaded_onto_the_device_in_the_type_that_was_asked_for(device: str, base: Path) -> None:
    model = load_base(base, dtype=torch.bfloat16, device=device)
    assert {(value.device.type, value.dtype) for value in model.parameters()} == {(device, torch.bfloat16)}
    assert model(input_ids=torch.tensor([[3, 4]], device=device)).logits.isfinite().all()


def test_the_measured_speed_names_the_device_and_is_finite(device: str) -> None:
    speed = measure_speed(device, 1)
    assert speed.device == device
    assert all(1e8 < flops < 1e17 for flops in speed.product_flops.values())


@pytest.mark.gpu
def test_the_device_has_the_name_and_memory_that_its_driver_reports() -> None:
    device = find_device(Settings(_env_file=None, device="cuda", memory_reserve_bytes=1))
    total = torch.cuda.get_device_properties(0).total_memory
    assert device.name.startswith("GPU-")
    assert device.total_bytes == pytest.approx(total, rel=0.05)
