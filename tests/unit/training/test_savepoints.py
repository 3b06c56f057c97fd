"""Save points: what is resumed goes on exactly where it stopped, for every kind of trained weight."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.core.errors import ArtifactCorruptError
from luthier.core.specs import BaseFacts
from luthier.methods import Start, Workload, check_tuning, parse_tuning
from luthier.modeling.load import load_base
from luthier.modeling.protocols import Batch
from luthier.training.loop.gradient_accumulation import apply_gradients, compute_gradients
from luthier.training.loop.run_stats import Progress
from luthier.training.model.batches import collate
from luthier.training.model.optimizer import SplitAdamW, build_optimizer
from luthier.training.model.training_model import JobModel
from luthier.training.output.resume_state import SavePoints
from tests.tiny import BASE_ID, build_tiny_base, build_tiny_rows

ROWS = build_tiny_rows(12)
KINDS: dict[str, tuple[dict[str, Any], torch.dtype]] = {
    "full": ({"type": "full"}, torch.float32),
    "full with masters": ({"type": "full"}, torch.bfloat16),
    "full with a frozen part": ({"type": "full", "freeze": ["embed_tokens"]}, torch.bfloat16),
    "adapter with dropout": ({"type": "adapter", "dropout": 0.3}, torch.float32),
    "lora": ({"type": "lora"}, torch.bfloat16),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("bases") / BASE_ID)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch(*rows: int) -> Batch:
    return collate(ROWS, np.array(rows), pad_id=2)


def begin(base: Path, kind: str) -> tuple[JobModel, torch.optim.Optimizer]:
    tuning, dtype = KINDS[kind]
    method, params = parse_tuning(check_tuning(tuning))
    facts = BaseFacts.model_validate_json((base / "base.json").read_bytes())
    resolved = method.resolve(params, Workload(facts, num_rows=8, num_tokens=200))
    start = Start(5, BASE_ID, tokenize=lambda _text: [7])
    attached = method.attach(load_base(base, dtype=dtype, device="cpu"), resolved, start)
    trainee = JobModel(method, attached, "cpu", batch(0))
    attached.model.train()
    optimizer = build_optimizer(trainee.parameters, learning_rate=1e-3, weight_decay=0.1, device="cpu")
    return trainee, optimizer


def step(trainee: JobModel, optimizer: torch.optim.Optimizer, number: int) -> None:
    first = 2 * number % 12
    parts = [batch(first), batch(first + 1)]
    num_supervised = sum(int(part.supervised_BT.sum()) for part in parts)
    scores = compute_gradients(trainee, parts, num_supervised=num_supervised)
    apply_gradients(trainee, optimizer, scores, learning_rate=1e-3, max_grad_norm=1.0)


def refuse(text: str) -> None:
    pytest.fail(text)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop_after", [1, 4])
def test_the_saved_bytes_are_those_of_a_run_that_was_never_stopped(
    base: Path, tmp_path: Path, kind: str, stop_after: int
) -> None:
    num_steps = 6
    trainee, optimizer = begin(base, kind)
    save_points = SavePoints(tmp_path / "save_points", "x")
    for number in range(num_steps):
        step(trainee, optimizer, number)
        if number + 1 == stop_after:
            save_points.write(Progress(step=stop_after), trainee, optimizer)
    (tmp_path / "expected").mkdir()
    names = trainee.method.save(trainee.attached, tmp_path / "expected")

    again, other = begin(base, kind)
    torch.manual_seed(999)
    found = save_points.find(refuse)
    assert found is not None
    save_points.restore(found, again, other)
    for number in range(found.progress.step, num_steps):
        step(again, other, number)
    (tmp_path / "found").mkdir()
    again.method.save(again.attached, tmp_path / "found")
    for name in names:
        assert (tmp_path / "found" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes(), name


def test_masters_are_saved_not_their_rounded_copies_alone(base: Path, tmp_path: Path) -> None:
    trainee, optimizer = begin(base, "full with masters")
    step(trainee, optimizer, 0)
    save_points = SavePoints(tmp_path, "x")
    save_points.write(Progress(step=1), trainee, optimizer)
    again, other = begin(base, "full with masters")
    found = save_points.find(refuse)
    assert found is not None
    save_points.restore(found, again, other)
    assert isinstance(optimizer, SplitAdamW)
    assert isinstance(other, SplitAdamW)
    expected = [optimizer.master(parameter) for parameter in trainee.parameters]
    masters = [other.master(parameter) for parameter in again.parameters]
    assert all(torch.equal(one, two) for one, two in zip(masters, expected, strict=True))
    assert any(not torch.equal(one, one.bfloat16().float()) for one in masters)


def test_a_save_point_of_other_parameters_is_refused(base: Path, tmp_path: Path) -> None:
    trainee, optimizer = begin(base, "lora")
    step(trainee, optimizer, 0)
    save_points = SavePoints(tmp_path, "x")
    save_points.write(Progress(step=1), trainee, optimizer)
    found = save_points.find(refuse)
    assert found is not None
    with pytest.raises(ArtifactCorruptError, match="other parameters"):
        save_points.restore(found, *begin(base, "full"))


def test_the_newest_two_are_kept(base: Path, tmp_path: Path) -> None:
    trainee, optimizer = begin(base, "lora")
    step(trainee, optimizer, 0)
    save_points = SavePoints(tmp_path, "x")
    for number in (1, 2, 3):
        save_points.write(Progress(step=number), trainee, optimizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000003"]


def test_the_newest_are_told_by_number_however_many_digits_it_has(base: Path, tmp_path: Path) -> None:
    trainee, optimizer = begin(base, "lora")
    step(trainee, optimizer, 0)
    save_points = SavePoints(tmp_path, "x")
    for number in (999_998, 999_999, 1_000_000):
        save_points.write(Progress(step=number), trainee, optimizer)
    found = save_points.find(refuse)
    assert found is not None
    assert found.progress.step == 1_000_000
