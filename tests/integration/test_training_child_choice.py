"""Which checkpoint becomes the model, and when training ends before its last step; also across kills."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from luthier.core.events import CheckpointEvent, TrainingEvent
from luthier.core.specs import RunInputs
from luthier.storage.manifests import verify_folder
from luthier.training.loop import evaluation as evaluate_module
from luthier.training.loop.evaluation import Scores
from tests.tiny import build_tiny_base, build_tiny_run
from tests.training_runs import failed, finished, run_here, run_killed_everywhere

# Six epochs of three steps.
SETTINGS: dict[str, Any] = {
    "num_rows": 12,
    "num_validation_rows": 3,
    "hyperparameters": {"n_epochs": 6, "batch_size": 4},
}
TRAINING = {"save_every_steps": 2, "learning_rate": 5e-3}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("bases") / "tiny-llama")


class Losses:
    """Real evaluations whose losses are replaced by those of a list, by epochs done.

    Args:
        valid: of the validation rows; the base's first.
        general: of the general text; the base's first.
    """

    def __init__(self, valid: Sequence[float], general: Sequence[float] | None = None) -> None:
        self._valid = valid
        self._general = general or [3.0] * len(valid)

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let every evaluation of this test see these losses."""
        examine, evaluate = evaluate_module.Evaluator.evaluate, evaluate_module.evaluate
        epoch = 0

        def examine_epoch(*arguments: Any, **options: Any) -> Any:
            nonlocal epoch
            epoch = int(options["epoch"])
            return examine(*arguments, **options)

        def score(training_model: Any, rows: Any, **options: Any) -> Scores:
            scores = evaluate(training_model, rows, **options)
            losses = self._valid if rows.num_rows == SETTINGS["num_validation_rows"] else self._general
            return Scores(loss=losses[epoch], accuracy=scores.accuracy)

        monkeypatch.setattr(evaluate_module.Evaluator, "evaluate", examine_epoch)
        monkeypatch.setattr(evaluate_module, "evaluate", score)


def build(folder: Path, base: Path, **training: Any) -> Path:
    return build_tiny_run(folder, base, **SETTINGS, training=TRAINING | training)


def checkpoints(events: list[TrainingEvent]) -> dict[int, CheckpointEvent]:
    return {event.step: event for event in events if isinstance(event, CheckpointEvent)}


def messages(events: list[TrainingEvent]) -> list[str]:
    return [event.message for event in events if event.type == "message"]


def test_patience_ends_training_after_evaluations_without_a_better_loss(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The base's own loss, lower than any, does not count: it is no checkpoint.
    Losses([1.0, 5.0, 4.0, 4.5, 4.0, 3.0, 2.0]).install(monkeypatch)
    events = run_here(build(tmp_path / "run", base, patience=2))
    report = finished(events).report
    assert finished(events).step == report.result_step == report.steps_done == 12
    assert report.steps_planned == 18
    assert report.stopped_early is not None
    assert "after step 12" in report.stopped_early
    assert "4.0000, that of step 6, in 2 evaluations" in report.stopped_early
    assert report.stopped_early in messages(events)
    assert finished(events).digest == checkpoints(events)[12].digest
    assert finished(events).trained_tokens == report.tokens_seen == tokens_of_steps(events)


def tokens_of_steps(events: list[TrainingEvent]) -> int:
    return sum(event.num_tokens for event in events if event.type == "step")


def test_keep_best_publishes_the_checkpoint_with_the_lowest_validation_loss(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Losses([9.0, 5.0, 4.0, 3.0, 3.0, 3.5, 4.0]).install(monkeypatch)
    folder = build(tmp_path / "run", base, keep_best=True)
    events = run_here(folder)
    end = finished(events)
    assert (end.step, end.report.result_step, end.report.steps_done) == (9, 9, 18)
    assert end.report.stopped_early is None
    chosen = checkpoints(events)[9]
    assert end.digest == chosen.digest == verify_folder(folder / "artifact").digest
    assert end.metrics == chosen.metrics
    assert end.metrics.full_valid_loss == 3.0
    assert len({event.digest for event in checkpoints(events).values()}) == 6
    assert end.report.artifact_digest == end.digest


def test_a_best_checkpoint_that_is_the_last_is_published_as_ever(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Losses([9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0]).install(monkeypatch)
    events = run_here(build(tmp_path / "run", base, keep_best=True))
    assert finished(events).step == 18
    assert finished(events).digest == checkpoints(events)[18].digest


def test_max_forgetting_ends_training_and_publishes_the_last_checkpoint_below_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    valid = [9.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0]
    Losses(valid, general=[3.0, 3.05, 3.2, 3.4, 3.0, 3.0, 3.0]).install(monkeypatch)
    events = run_here(build(tmp_path / "run", base, max_forgetting=0.3))
    end = finished(events)
    assert (end.step, end.report.result_step, end.report.steps_done) == (6, 6, 9)
    assert end.report.stopped_early is not None
    assert "0.4000" in end.report.stopped_early
    assert "0.3" in end.report.stopped_early
    # The model that forgot too much is not to be had as a checkpoint either.
    assert list(checkpoints(events)) == [3, 6]
    assert end.digest == checkpoints(events)[6].digest
    assert [e.forgetting for e in end.report.evaluations] == [
        None,
        pytest.approx(0.05),
        pytest.approx(0.2),
        pytest.approx(0.4),
    ]


def test_max_forgetting_and_keep_best_choose_the_best_among_those_below(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    valid = [9.0, 5.0, 6.0, 1.0, 1.0, 1.0, 1.0]
    Losses(valid, general=[3.0, 3.05, 3.2, 3.4, 3.0, 3.0, 3.0]).install(monkeypatch)
    events = run_here(build(tmp_path / "run", base, max_forgetting=0.3, keep_best=True))
    assert finished(events).step == 3


def test_a_first_evaluation_above_max_forgetting_fails_names_the_figure_and_publishes_nothing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Losses([9.0, 8.0], general=[3.0, 3.5]).install(monkeypatch)
    folder = build(tmp_path / "run", base, max_forgetting=0.3)
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


CHOICES: dict[str, tuple[dict[str, Any], Losses]] = {
    "patience": ({"patience": 2}, Losses([1.0, 5.0, 4.0, 4.5, 4.0, 3.0, 2.0])),
    "keep_best": ({"keep_best": True}, Losses([9.0, 5.0, 4.0, 3.0, 3.0, 3.5, 4.0])),
    "both": ({"keep_best": True, "patience": 1}, Losses([9.0, 4.0, 3.0, 3.5, 1.0, 1.0, 1.0])),
    "max_forgetting": ({"max_forgetting": 0.3}, Losses([9.0] * 7, [3.0, 3.1, 3.2, 3.4, 3.0, 3.0, 3.0])),
}


@pytest.mark.parametrize("name", list(CHOICES))
def test_kills_around_every_evaluation_change_neither_the_choice_nor_the_end(
    name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, losses = CHOICES[name]
    losses.install(monkeypatch)
    expected = finished(run_here(build(tmp_path / "undisturbed", base, **training)))
    folder = build(tmp_path / "killed", base, **training)
    _, events = run_killed_everywhere(folder, kinds=frozenset({"evaluated", "checkpoint", "save_point"}))
    found = finished(events)
    assert (found.step, found.digest, found.metrics) == (expected.step, expected.digest, expected.metrics)
    assert found.trained_tokens == expected.trained_tokens
    for field in ("evaluations", "result_step", "steps_done", "stopped_early", "artifact_digest"):
        assert getattr(found.report, field) == getattr(expected.report, field)


def test_the_best_checkpoint_outlives_its_run_directory_in_the_save_point(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Losses([9.0, 2.0, 4.0, 3.0, 3.0, 3.5, 4.0]).install(monkeypatch)
    expected = finished(run_here(build(tmp_path / "undisturbed", base, keep_best=True)))
    assert expected.step == 3
    # Each attempt is in a folder of its own, and finds there the newest save point of the one before.
    save_point: Path | None = None
    for attempt, last in enumerate([4, 8, 13, 99]):
        folder = build(tmp_path / f"attempt-{attempt}", base, keep_best=True)
        if save_point is not None:
            shutil.copytree(save_point, folder / "save_points" / save_point.name)
        events = run_here(folder, kill_after=lambda e, at=last: e.type == "save_point" and e.step >= at)
        if last != 99:
            save_point = sorted((folder / "save_points").glob("step-*"))[-1]
    assert finished(events).digest == expected.digest
    assert finished(events).metrics == expected.metrics


def test_a_result_of_an_earlier_attempt_has_the_name_that_the_last_one_gives(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Losses([9.0, 2.0, 4.0, 3.0, 3.0, 3.5, 4.0]).install(monkeypatch)
    first = build(tmp_path / "first", base, keep_best=True)
    run_here(first, kill_after=lambda event: event.type == "save_point" and event.step >= 8)
    second = build(tmp_path / "second", base, keep_best=True)
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
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Losses([9.0, 5.0, 4.0, 3.0, 2.0, 3.5, 4.0]).install(monkeypatch)
    folder = build(tmp_path / "run", base, keep_best=True, save_every_steps=4)
    run_here(folder, kill_after=lambda event: event.type == "checkpoint" and event.step == 12)
    assert chosen_digest(folder) == verify_folder(folder / "checkpoints/step-000012").digest
    # The save point of step 8 knows only the evaluations up to step 6.
    run_here(folder, kill_after=lambda event: event.type == "started")
    assert chosen_digest(folder) == verify_folder(folder / "checkpoints/step-000006").digest


def chosen_digest(folder: Path) -> str:
    return verify_folder(folder / "chosen").digest
