"""Runs on preferences, from the run directory to the artifact."""

from typing import Any

import pytest

from luthier.core.events import EvaluatedEvent, StepEvent, TrainingEvent
from luthier.methods import discover
from tests.training_runs import Build, finished, run_here, run_killed_everywhere

SETTINGS: dict[str, Any] = {
    "num_rows": 12,
    "num_validation_rows": 4,
    "beta": 0.5,
    "hyperparameters": {"n_epochs": 2, "batch_size": 4},
    "training": {"save_every_steps": 2, "learning_rate": 5e-3},
}
# Pairs of 2 x 12 to 2 x 47 tokens: every step has several parts.
MAX_TOKENS = 128


def steps(events: list[TrainingEvent]) -> list[StepEvent]:
    return [event for event in events if isinstance(event, StepEvent)]


@pytest.mark.parametrize("method", list(discover()))
def test_every_method_learns_to_prefer(method: str, build: Build) -> None:
    training = {"learning_rate": 3e-2 if method in ("prompt", "prefix") else 5e-3}
    settings = SETTINGS | {"training": training, "hyperparameters": {"n_epochs": 8, "batch_size": 4}}
    folder = build("run", tuning={"type": method}, **settings)
    events = run_here(folder, max_tokens=MAX_TOKENS)
    last = finished(events)
    reported = [event.metrics for event in steps(events)]
    margins = [metrics.train_reward_margin for metrics in reported if metrics.train_reward_margin is not None]
    assert len(margins) == len(reported) == 24
    assert margins[-1] > max(0.1, margins[0])
    assert all(metrics.train_mean_token_accuracy is None for metrics in reported)
    assert last.metrics.full_valid_reward_accuracy is not None
    first = next(event.evaluation for event in events if isinstance(event, EvaluatedEvent))
    assert first.valid_reward_margin == pytest.approx(0.0, abs=1e-3)
    # ln 2: the start prefers nothing to itself.
    assert first.valid_loss == pytest.approx(0.6931, abs=1e-3)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_run_killed_after_every_event_gives_the_undisturbed_digest(method: str, build: Build) -> None:
    settings = SETTINGS | {"tuning": {"type": method}}
    undisturbed = build("undisturbed", **settings)
    expected = finished(run_here(undisturbed, max_tokens=MAX_TOKENS))
    folder = build("killed", **settings)
    num_kills, events = run_killed_everywhere(folder, max_tokens=MAX_TOKENS)
    found = finished(events)
    assert num_kills == 15
    assert found.digest == expected.digest
    assert found.metrics == expected.metrics
    assert found.report.evaluations == expected.report.evaluations
