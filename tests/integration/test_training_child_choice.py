"""Which checkpoint becomes the model, and when training ends before its last step; also across kills."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from luthier.core.events import CheckpointEvent, TrainingEvent
from luthier.core.specs import RunInputs
from luthier.storage.manifests import verify_folder
from luthier.training.loop import evaluation as evaluate_module
from luthier.training.loop.evaluation import Scores
from tests.tiny import build_tiny_run
from tests.training_runs import Build, failed, finished, run_here, run_killed_everywhere

# Six epochs of three steps.
SETTINGS: dict[str, Any] = {
    "num_rows": 12,
    "num_validation_rows": 3,
    "hyperparameters": {"n_epochs": 6, "batch_size": 4},
}
TRAINING = {"save_every_steps": 2, "learning_rate": 5e-3}


class Losses:
    """Real evaluations whose losses are replaced by those of a list, by epochs done.

    Args:
        valid: of the validation rows; the base's first.
        general: of the general text; the base's first.
    """

    def __init__(self, valid: Sequence[float], general: Sequence[float] | None = None) -> None:
        self.valid = valid
        self.general = general or [3.0] * len(valid)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        examine, evaluate = evaluate_module.Evaluator.evaluate, evaluate_module.evaluate
        epoch = 0

        def examine_epoch(*arguments: Any, **options: Any) -> Any:
            nonlocal epoch
            epoch = int(options["epoch"])
            return examine(*arguments, **options)

        def score(training_model: Any, rows: Any, **options: Any) -> Scores:
            scores = evaluate(training_model, rows, **options)
            losses = self.valid if rows.num_rows == SETTINGS["num_validation_rows"] else self.general
            return Scores(loss=losses[epoch], accuracy=scores.accuracy)

        monkeypatch.setattr(evaluate_module.Evaluator, "evaluate", examine_epoch)
        monkeypatch.setattr(evaluate_module, "evaluate", score)


@pytest.fixture
def build(build: Build) -> Build:
    """Write a run directory that asks for a choice."""
    return lambda name, **training: build(name, **SETTINGS, training=TRAINING | training)


def checkpoints(events: list[TrainingEvent]) -> dict[int, CheckpointEvent]:
    return {event.step: event for event in events if isinstance(event, CheckpointEvent)}


def messages(events: list[TrainingEvent]) -> list[str]:
    return [event.message for event in events if event.type == "message"]


@dataclass(frozen=True)
class Choice:
    """What a job asks for, the losses that it sees, its result, and the steps that are done."""

    training: dict[str, Any]
    losses: Losses
    result: int
    steps_done: int
    # Parts of the reason of an early end.
    why: tuple[str, ...] = ()


# The third epoch forgets too much.
GENERAL = [3.0, 3.05, 3.2, 3.4, 3.0, 3.0, 3.0]
CHOICES = {
    # The base's own loss, lower than any, does not count: it is no checkpoint.
    "patience": Choice(
        {"patience": 2},
        Losses([1.0, 5.0, 4.0, 4.5, 4.0, 3.0, 2.0]),
        12,
        12,
        ("after step 12", "4.0000, that of step 6, in 2 evaluations"),
    ),
    "keep_best": Choice({"keep_best": True}, Losses([9.0, 5.0, 4.0, 3.0, 3.0, 3.5, 4.0]), 9, 18),
    "the last is the best": Choice({"keep_best": True}, Losses([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0]), 18, 18),
    "keep_best and patience": Choice(
        {"keep_best": True, "patience": 1},
        Losses([9.0, 4.0, 3.0, 3.5, 1.0, 1.0, 1.0]),
        6,
        9,
        ("after step 9",),
    ),
    "max_forgetting": Choice(
        {"max_forgetting": 0.3},
        Losses([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0], GENERAL),
        6,
        9,
        ("0.4000", "0.3"),
    ),
    # The best among those below.
    "max_forgetting and keep_best": Choice(
        {"max_forgetting": 0.3, "keep_best": True},
        Losses([9.0, 5.0, 6.0, 1.0, 1.0, 1.0, 1.0], GENERAL),
        3,
        9,
        ("0.4000", "0.3"),
    ),
}


def check_choice(choice: Choice, folder: Path, events: list[TrainingEvent]) -> None:
    end, report, published = finished(events), finished(events).report, checkpoints(events)
    assert (end.step, report.result_step, report.steps_done) == (
        choice.result,
        choice.result,
        choice.steps_done,
    )
    assert report.steps_planned == 18
    assert (report.stopped_early is None) == (choice.why == ())
    assert all(part in report.stopped_early for part in choice.why)
    assert report.stopped_early is None or report.stopped_early in messages(events)
    chosen = published[choice.result]
    assert end.digest == chosen.digest == report.artifact_digest == verify_folder(folder / "artifact").digest
    assert end.metrics == chosen.metrics
    assert end.metrics.full_valid_loss == choice.losses.valid[choice.result // 3]
    assert end.trained_tokens == report.tokens_seen
    assert report.tokens_seen == sum(event.num_tokens for event in events if event.type == "step")
    epochs = range(1, choice.steps_done // 3 + 1)
    forgetting = [choice.losses.general[epoch] - choice.losses.general[0] for epoch in epochs]
    assert [one.forgetting for one in report.evaluations] == [None, *map(pytest.approx, forgetting)]
    # A model that forgot too much is not to be had as a checkpoint either.
    most = choice.training.get("max_forgetting", 99)
    assert list(published) == [
        3 * epoch for epoch, lost in zip(epochs, forgetting, strict=True) if lost <= most
    ]
    assert len({event.digest for event in published.values()}) == len(published)


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_kept_whatever_kills_come_around_its_evaluations(
    name: str, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = CHOICES[name]
    choice.losses.install(monkeypatch)
    undisturbed = build("undisturbed", **choice.training)
    events = run_here(undisturbed)
    check_choice(choice, undisturbed, events)
    folder = build("killed", **choice.training)
    _, resumed = run_killed_everywhere(folder, kinds=frozenset({"evaluated", "checkpoint", "save_point"}))
    expected, found = finished(events), finished(resumed)
    assert (found.step, found.digest, found.metrics) == (expected.step, expected.digest, expected.metrics)
    assert found.trained_tokens == expected.trained_tokens
    for field in ("evaluations", "result_step", "steps_done", "stopped_early", "artifact_digest"):
        assert getattr(found.report, field) == getattr(expected.report, field)


def test_a_first_evaluation_above_max_forgetting_fails_names_the_figure_and_publishes_nothing(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    Losses([9.0, 8.0], general=[3.0, 3.5]).install(monkeypatch)
    folder = build("run", max_forgetting=0.3)
    events = run_here(folder)
    assert (failed(events).code, failed(events).param) == ("too_much_forgetting", "training.max_forgetting")
    assert "0.5000 nats" in failed(events).message
    assert not checkpoints(events)
    assert not (folder / "artifact").exists()


@pytest.mark.parametrize("training", [{"patience": 2}, {"keep_best": True}])
def test_what_needs_validation_rows_is_refused_without_any(
    training: dict[str, Any], base: Path, tmp_path: Path
) -> None:
    settings = SETTINGS | {"num_validation_rows": 0}
    events = run_here(build_tiny_run(tmp_path / "run", base, **settings, training=training))
    (name,) = training
    assert [event.type for event in events] == ["failed"]
    assert (failed(events).code, failed(events).param) == ("invalid_value", f"training.{name}")


def test_the_best_checkpoint_outlives_its_run_directory_in_the_save_point(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    Losses([9.0, 2.0, 4.0, 3.0, 3.0, 3.5, 4.0]).install(monkeypatch)
    expected = finished(run_here(build("undisturbed", keep_best=True)))
    assert expected.step == 3
    # Each attempt is in a folder of its own, and finds there the newest save point of the one before.
    save_point: Path | None = None
    for attempt, last in enumerate([4, 8, 13, 99]):
        folder = build(f"attempt-{attempt}", keep_best=True)
        if save_point is not None:
            shutil.copytree(save_point, folder / "save_points" / save_point.name)
        events = run_here(folder, kill_after=lambda e, at=last: e.type == "save_point" and e.step >= at)
        if last != 99:
            save_point = sorted((folder / "save_points").glob("step-*"))[-1]
    assert finished(events).digest == expected.digest
    assert finished(events).metrics == expected.metrics


def test_a_result_of_an_earlier_attempt_has_the_name_that_the_last_one_gives(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    Losses([9.0, 2.0, 4.0, 3.0, 3.0, 3.5, 4.0]).install(monkeypatch)
    first = build("first", keep_best=True)
    run_here(first, kill_after=lambda event: event.type == "save_point" and event.step >= 8)
    second = build("second", keep_best=True)
    shutil.copytree(first / "save_points", second / "save_points")
    inputs = RunInputs.model_validate_json((second / "inputs.json").read_bytes())
    renamed = inputs.model_copy(update={"model_name": "ft:tiny-llama:org::zyxwvuts"})
    (second / "inputs.json").write_text(renamed.model_dump_json())
    event = finished(run_here(second))
    assert event.step == 3
    card = (second / "artifact" / "README.md").read_text()
    assert "zyxwvuts" in card
    assert inputs.model_name not in card
    assert verify_folder(second / "artifact").digest == event.digest


def test_a_choice_that_no_save_point_knows_is_forgotten(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    Losses([9.0, 5.0, 4.0, 3.0, 2.0, 3.5, 4.0]).install(monkeypatch)
    folder = build("run", keep_best=True, save_every_steps=4)
    run_here(folder, kill_after=lambda event: event.type == "checkpoint" and event.step == 12)
    assert verify_folder(folder / "chosen").digest == verify_folder(folder / "checkpoints/step-000012").digest
    # The save point of step 8 knows only the evaluations up to step 6.
    run_here(folder, kill_after=lambda event: event.type == "started")
    assert verify_folder(folder / "chosen").digest == verify_folder(folder / "checkpoints/step-000006").digest
