"""Save points: what is resumed continues exactly where it stopped, for every kind of trained weight."""

from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.core.errors import ArtifactCorruptError
from luthier.training.loop.run_stats import Progress
from luthier.training.model.optimizer import build_optimizer
from luthier.training.model.training_model import JobModel
from luthier.training.output.resume_state import SavePoints
from tests.tiny_methods import batch, make_job_model, step

KINDS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "full": ({"type": "full"}, torch.float32),
    "full with masters": ({"type": "full"}, torch.bfloat16),
    "full with a frozen part": ({"type": "full", "freeze": ["embed_tokens"]}, torch.bfloat16),
    "adapter with dropout": ({"type": "adapter", "dropout": 0.3}, torch.float32),
    "lora": ({"type": "lora"}, torch.bfloat16),
}


def begin(base: Path, kind: str) -> tuple[JobModel, torch.optim.Optimizer]:
    tuning, dtype = KINDS[kind]
    job_model = make_job_model(base, tuning, dtype=dtype, sample=batch(0))
    job_model.attached.model.train()
    optimizer = build_optimizer(job_model.parameters, learning_rate=1e-3, weight_decay=0.1, device="cpu")
    return job_model, optimizer


def advance(job_model: JobModel, optimizer: torch.optim.Optimizer, number: int) -> None:
    first = 2 * number % 8
    step(job_model, optimizer, [batch(first), batch(first + 1)], learning_rate=1e-3)


def refuse(text: str) -> None:
    pytest.fail(text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop_after", [1, 4])
def test_the_saved_bytes_are_those_of_a_run_that_was_never_stopped(base, tmp_path, kind, stop_after):
    num_steps = 6
    job_model, optimizer = begin(base, kind)
    save_points = SavePoints(tmp_path / "save_points", "x")
    for number in range(num_steps):
        advance(job_model, optimizer, number)
        if number + 1 == stop_after:
            save_points.write(Progress(step=stop_after), job_model, optimizer)
    (tmp_path / "expected").mkdir()
    names = job_model.method.save(job_model.attached, tmp_path / "expected")

    again, other = begin(base, kind)
    torch.manual_seed(999)
    found = save_points.find(refuse)
    save_points.restore(found, again, other)
    for number in range(found.progress.step, num_steps):
        advance(again, other, number)
    (tmp_path / "found").mkdir()
    again.method.save(again.attached, tmp_path / "found")
    for name in names:
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes(), name


def test_masters_are_saved_not_their_rounded_copies_alone(base, tmp_path):
    job_model, optimizer = begin(base, "full with masters")
    advance(job_model, optimizer, 0)
    save_points = SavePoints(tmp_path, "x")
    save_points.write(Progress(step=1), job_model, optimizer)
    again, other = begin(base, "full with masters")
    found = save_points.find(refuse)
    save_points.restore(found, again, other)
    expected = [optimizer.master(parameter) for parameter in job_model.parameters]
    masters = [other.master(parameter) for parameter in again.parameters]
    assert all(torch.equal(one, two) for one, two in zip(masters, expected, strict=True))
    assert any(not torch.equal(one, one.bfloat16().float()) for one in masters)


def saved(base: Path, folder: Path, *numbers: int) -> SavePoints:
    """Write save points of one LoRA run under step numbers."""
    job_model, optimizer = begin(base, "lora")
    advance(job_model, optimizer, 0)
    save_points = SavePoints(folder, "x")
    for number in numbers:
        save_points.write(Progress(step=number), job_model, optimizer)
    return save_points


def test_a_save_point_of_other_parameters_is_refused(base, tmp_path):
    save_points = saved(base, tmp_path, 1)
    with pytest.raises(ArtifactCorruptError, match="other parameters"):
        save_points.restore(save_points.find(refuse), *begin(base, "full"))


def test_the_newest_two_are_kept(base, tmp_path):
    saved(base, tmp_path, 1, 2, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_the_newest_are_recognised_by_number_however_many_digits_it_has(base, tmp_path):
    save_points = saved(base, tmp_path, 999_998, 999_999, 1_000_000)
    assert save_points.find(refuse).progress.step == 1_000_000
