"""A job followed by trackers: a real PostgreSQL and a real TensorBoard file, a scripted training process."""

import threading
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import openai
import pytest
import structlog
from pydantic import SecretStr

from db.tables import Worker
from luthier.core.events import EvaluatedEvent, Evaluation, FailedEvent, Metrics, SampleAnswer
from luthier.core.settings import Settings
from luthier.core.specs import DpoOptions, TrainingOptions, TrainingSpec, TunedModel
from luthier.trackers import discover
from luthier.trackers.base import RunStatus, TrackedRun, Tracker, TrackerConfig, TrackerRun
from services.jobs.leases import Lease
from tests.conftest import Api
from tests.event_files import read_events, scalars
from tests.integration.training_script import BASE_FACTS, Script, ScriptedChild, run_script
from tests.rows import colour_rows, jsonl
from tests.training import Jobs, train_next
from worker.context import WorkerContext
from worker.tasks.prepare import prepare
from worker.training_process import tracking
from worker.training_process.tracking import TrackerThread, start_tracking


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    return settings.model_copy(update={"tensorboard_dir": str(tmp_path / "curves")})


@pytest.fixture
def client(api: Api) -> openai.OpenAI:
    # Not the strict one: the SDK's types know no tracker but wandb.
    return api.client(is_strict=False)


class Broken(Tracker):
    """A tracker whose every act raises, or hangs until the test lets it go."""

    name = "broken"

    def __init__(self, *, hangs: bool = False) -> None:
        self.hangs = hangs
        self.may_go = threading.Event()

    def missing_setting(self, settings: Settings) -> str | None:
        return None

    def open(self, config: TrackerConfig, run: TrackedRun, settings: Settings) -> TrackerRun:
        if self.hangs:
            self.may_go.wait(30)
        raise ConnectionError("https://key@tracker.example is away")


class Listening(Broken, TrackerRun):
    """A tracker, and its only run, that keep what they get."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: list[TrackedRun] = []
        # Steps with their metrics, and the outcome last.
        self.written: list[Any] = []

    def open(self, config: TrackerConfig, run: TrackedRun, settings: Settings) -> TrackerRun:
        self.opened.append(run)
        return self

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.written.append((step, metrics))

    def close(self, status: RunStatus) -> None:
        self.written.append(status)


WANTED = {"type": "broken", "broken": {"project": "p"}}


@pytest.fixture(params=[Broken])
def tracker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Broken:
    """A tracker of the test's kind under the name `broken`."""
    made = request.param()
    monkeypatch.setitem(discover(), "broken", made)
    return made


listening = pytest.mark.parametrize("tracker", [Listening], indirect=True)


def _follow(tracker: Tracker, settings: Settings) -> TrackerThread:
    return TrackerThread(tracker, TrackerConfig(project="p"), TrackedRun("j", "p", "b"), settings)


def _create(jobs: Jobs, *integrations: dict[str, Any]) -> str:
    return jobs.create(rows=colour_rows(24), integrations=list(integrations))


def _run(jobs: Jobs, job_id: str, folder: Path, *, epochs: int = 3) -> str:
    prepare(jobs.context, job_id)
    claimed = jobs.claim()

    def write(script: Script) -> None:
        script.start()
        for epoch in range(1, epochs + 1):
            script.epoch(epoch, 3.0 - epoch / 2)
        script.finish(epochs)

    tracking = start_tracking(
        jobs.context, claimed.lease, claimed.project_id, claimed.spec, claimed.integrations
    )
    ending = run_script(
        jobs.context, folder, write, steps=2, epochs=epochs, claimed=claimed, tracking=tracking
    )
    tracking.end()
    return ending.value


def test_tensorboard_shows_the_curves_of_a_job(jobs: Jobs, tmp_path: Path) -> None:
    wanted = {"type": "tensorboard", "tensorboard": {"project": "mine", "name": "first"}}
    job_id = _create(jobs, wanted)
    assert jobs.get(job_id).to_dict()["integrations"] == [wanted]
    assert _run(jobs, job_id, tmp_path / "run") == "succeeded"
    (path,) = (tmp_path / "curves").rglob("*tfevents*")
    assert path.parent.name == f"first-{job_id}"
    assert path.parent.parent.name == "mine"
    events = [(event.step, scalars(event)) for event in read_events(path) if scalars(event)]
    steps = [(step, values) for step, values in events if "train_loss" in values]
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5, 6]
    # The script's losses are 1 / step, here as 32-bit floats.
    assert [round(values["train_loss"] * step, 5) for step, values in steps] == [1.0] * 6
    assert {"learning_rate", "grad_norm", "train_mean_token_accuracy", "epoch"} <= set(steps[0][1])
    scores = {step: values["valid_loss"] for step, values in events if "valid_loss" in values}
    assert scores == {0: 9.0, 2: 2.5, 4: 2.0, 6: 1.5}


def test_a_broken_tracker_costs_the_job_one_warning(jobs: Jobs, tracker: Broken, tmp_path: Path) -> None:
    tensorboard = {"type": "tensorboard", "tensorboard": {"project": "mine"}}
    job_id = _create(jobs, WANTED, WANTED | {}, tensorboard)
    assert _run(jobs, job_id, tmp_path / "run") == "succeeded"
    jobs.succeeded(job_id)
    events = jobs.client.fine_tuning.jobs.list_events(job_id, limit=100)
    messages = [event for event in events if event.level == "warn"]
    # One for each of the two, whatever else they would have had to say.
    assert len(messages) <= 2
    assert all("broken" in event.message and "key@" not in event.message for event in messages)
    assert list((tmp_path / "curves").rglob("*tfevents*"))


@listening
def test_a_tracker_gets_the_outcome_of_the_job(
    jobs: Jobs, tracker: Listening, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = _create(jobs, WANTED)
    prepare(jobs.context, job_id)
    failure = FailedEvent(job_id=job_id, code="non_finite_loss", message="The loss is not finite.")
    monkeypatch.setattr("worker.tasks.train.start_child", lambda *_: nullcontext(ScriptedChild([failure])))
    assert train_next(jobs.context)
    assert jobs.status(job_id) == "failed"
    assert tracker.written == ["failed"]


def test_a_fault_is_reported_once_and_a_full_queue_blocks_no_job(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    monkeypatch.setattr(tracking, "_MAX_WAITING", 3)
    monkeypatch.setattr(tracking, "_LAST_WORDS_SECONDS", 0.05)
    tracker = Broken(hangs=True)
    followed = tracking.Tracking([_follow(tracker, settings)], lambda: "succeeded")
    assert _take_steps(followed) == [
        "The integration broken does not follow this job: it is too slow, and some steps are left out"
    ]
    followed.end()
    tracker.may_go.set()


def _take_steps(followed: tracking.Tracking) -> list[str]:
    """Let twenty steps be followed; return what the job's events say of it."""
    messages: list[str] = []
    spec = TrainingSpec(base_id="b", tuning={"type": "lora"}, seed=1)
    script = Script("j", spec, Path(), steps_an_epoch=20, num_epochs=1)
    for step in range(1, 21):
        event = script.step(step, Metrics(train_loss=1.0))
        followed.take(event, add_event=lambda message, **_: messages.append(message))
    return messages


def test_what_raises_is_reported_by_its_kind_alone(settings: Settings) -> None:
    with structlog.testing.capture_logs() as logs:
        thread = _follow(Broken(), settings)
        thread.join(30)
    (line,) = logs
    assert (line["event"], line["error_type"]) == ("tracker failed", "ConnectionError")
    assert line["raised_at"].startswith("test_tracking.py:")
    assert line["raised_at"].endswith(" open")
    assert "key@" not in repr(line)
    messages = _take_steps(tracking.Tracking([thread], lambda: "failed"))
    assert messages == ["The integration broken does not follow this job: it has failed with ConnectionError"]


def test_a_configuration_of_another_version_is_reported_without_its_words(context: WorkerContext) -> None:
    lease = Lease("j", 1, context.worker_id)
    spec = TrainingSpec(base_id="b", tuning={"type": "lora"}, seed=1)
    wanted = {"type": "tensorboard", "tensorboard": {"project": "mine", "token": "not-for-the-log"}}
    with structlog.testing.capture_logs() as logs:
        start_tracking(context, lease, "p", spec, [wanted]).end()
    assert [line["error_type"] for line in logs] == ["ValidationError"]
    assert "not-for-the-log" not in repr(logs)


@listening
def test_a_tracker_gets_parameters_and_metrics_and_no_text_of_a_user(jobs: Jobs, tracker: Listening) -> None:
    parent = TunedModel(model_id="m", name="ft:parent", method="prompt", digest="sha256:1")
    spec = TrainingSpec(
        base_id="b",
        tuning={"type": "prompt", "num_virtual_tokens": 4, "init": "text", "init_text": "secret words"},
        training=TrainingOptions(sample_prompts=["secret words"]),
        seed=1,
        parent=parent,
        foundation=parent.model_copy(update={"name": "ft:foundation", "digest": "sha256:2"}),
        dpo=DpoOptions(beta=0.25),
    )
    script = Script("j", spec.model_copy(update={"base": BASE_FACTS}), Path(), steps_an_epoch=1, num_epochs=1)
    scores = {
        "valid_loss": 0.5,
        "valid_reward_accuracy": 0.75,
        "valid_reward_margin": 1.5,
        "general_loss": 3.0,
        "forgetting": 0.125,
    }
    answers = [SampleAnswer(prompt="secret words", answer="secret words")]
    evaluation = Evaluation(step=3, epoch=1.0, answers=answers, **scores)
    lease = Lease(_create(jobs), 1, jobs.context.worker_id)
    followed = start_tracking(jobs.context, lease, "p", spec, [WANTED])
    event = EvaluatedEvent(job_id="j", evaluation=evaluation, report=script.report(3))
    followed.take(event, add_event=lambda *_args, **_facts: None)
    followed.end()
    (run,) = tracker.opened
    expected = {
        "objective": "dpo",
        "dpo.beta": 0.25,
        "parent": "ft:parent",
        "parent.digest": "sha256:1",
        "foundation": "ft:foundation",
        "foundation.digest": "sha256:2",
        "tuning.type": "prompt",
        "tuning.init": "text",
        "seed": 1,
    }
    assert run.parameters.items() >= expected.items()
    assert tracker.written[:-1] == [(3, scores)]
    assert "secret words" not in repr((tracker.opened, tracker.written))


def test_all_that_waits_is_written_before_the_end(settings: Settings) -> None:
    tracker = Listening()
    followed = tracking.Tracking([_follow(tracker, settings)], lambda: "succeeded")
    _take_steps(followed)
    followed.end()
    *steps, outcome = tracker.written
    assert [step for step, _ in steps] == list(range(1, 21))
    assert outcome == "succeeded"


def _set_trackers(context: WorkerContext, *names: str) -> None:
    with context.database.transaction() as session:
        worker = session.get_one(Worker, context.worker_id)
        worker.facts = worker.facts | {"trackers": names}


def test_a_tracker_that_no_worker_has_is_refused(api: Api, jobs: Jobs) -> None:
    settings = api.state.settings.model_copy(update={"mlflow_tracking_uri": "http://mlflow.example"})
    object.__setattr__(api.state, "settings", settings)
    wanted = {"type": "mlflow", "mlflow": {"project": "p", "tags": ["a"]}}
    _set_trackers(jobs.context, "tensorboard")
    with pytest.raises(openai.BadRequestError) as caught:
        _create(jobs, wanted)
    assert (caught.value.param, caught.value.code) == ("integrations.0.type", "unsupported_value")
    assert "luthier[mlflow]" in str(caught.value)
    _set_trackers(jobs.context, "mlflow", "tensorboard")
    assert jobs.status(_create(jobs, wanted)) == "validating_files"


def test_the_sdks_own_wandb_integration_is_echoed_without_a_secret(api: Api) -> None:
    client = api.client()
    secret = SecretStr("not-for-clients")
    update = {"wandb_api_key": secret, "wandb_entity": "entity"}
    settings = api.state.settings.model_copy(update=update)
    object.__setattr__(api.state, "settings", settings)
    file = client.files.create(file=("rows.jsonl", jsonl(colour_rows(24))), purpose="fine-tune")
    wandb = {"project": "my-wandb-project", "entity": "entity", "name": "name", "tags": ["custom-tag"]}
    job = client.fine_tuning.jobs.create(
        model="tiny-llama",
        training_file=file.id,
        integrations=[{"type": "wandb", "wandb": wandb}],
    )
    assert job.integrations[0].wandb.model_dump() == wandb
    assert "not-for-clients" not in api.ask("GET", f"/fine_tuning/jobs/{job.id}").text
    # The operator's key may write to more entities than the operator's own.
    integrations = [{"type": "wandb", "wandb": wandb | {"entity": "another"}}]
    body = {"model": "tiny-llama", "training_file": file.id, "integrations": integrations}
    refused = api.ask("POST", "/fine_tuning/jobs", body=body)
    assert refused.json()["error"]["param"] == "integrations.0.wandb.entity"
