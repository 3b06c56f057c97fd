"""A job followed by trackers: a real PostgreSQL and a real TensorBoard file, a scripted training process."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import structlog
from pydantic import SecretStr

from db.tables import Worker
from luthier.core.events import EvaluatedEvent, Evaluation, FailedEvent, Metrics, SampleAnswer, StepEvent
from luthier.core.settings import Settings
from luthier.core.specs import DpoOptions, TrainingOptions, TrainingSpec, TunedModel
from luthier.trackers import discover
from luthier.trackers.base import RunStatus, TrackedRun, Tracker, TrackerConfig, TrackerRun
from services.jobs.leases import Lease
from tests.conftest import Api
from tests.event_files import read_events, scalars
from tests.integration.training_script import BASE_FACTS, Script, ScriptedChild, run_script
from tests.rows import colour_rows, jsonl
from tests.training import train_next
from worker.context import WorkerContext
from worker.tasks.prepare import prepare
from worker.tasks.train import claim
from worker.training_process import tracking
from worker.training_process.tracking import TrackerThread, start_tracking


@pytest.fixture
def settings(settings: Settings, tmp_path: Path) -> Settings:
    return settings.model_copy(update={"tensorboard_dir": str(tmp_path / "curves")})


@pytest.fixture
def client(api: Api) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{api.base_url}/v1", api_key=api.key, max_retries=0)


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


class Noted(TrackerRun):
    def __init__(self, steps: list[int]) -> None:
        self.steps = steps

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps.append(step)

    def close(self, status: RunStatus) -> None:
        self.steps.append(-1)


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[Broken]:
    made = Broken()
    monkeypatch.setitem(discover(), "broken", made)
    yield made
    made.may_go.set()


def _create(client: openai.OpenAI, *integrations: dict[str, Any]) -> Any:
    file = client.files.create(file=("rows.jsonl", jsonl(colour_rows(24))), purpose="fine-tune")
    return client.fine_tuning.jobs.create(
        model="tiny-llama", training_file=file.id, seed=1, extra_body={"integrations": list(integrations)}
    )


def _run(context: WorkerContext, job_id: str, folder: Path, *, epochs: int = 3) -> str:
    """Run the job with a scripted process; return its ending."""
    prepare(context, job_id)
    claimed = claim(context)
    assert claimed is not None

    def write(script: Script) -> None:
        script.start()
        for epoch in range(1, epochs + 1):
            script.epoch(epoch, 3.0 - epoch / 2)
        script.finish(epochs)

    tracking = start_tracking(context, claimed.lease, claimed.project_id, claimed.spec, claimed.integrations)
    ending = run_script(context, folder, write, steps=2, epochs=epochs, claimed=claimed, tracking=tracking)
    tracking.end()
    return ending.value


def test_tensorboard_shows_the_curves_of_a_job(
    client: openai.OpenAI, context: WorkerContext, tmp_path: Path
) -> None:
    wanted = {"type": "tensorboard", "tensorboard": {"project": "mine", "name": "first"}}
    job = _create(client, wanted)
    assert client.fine_tuning.jobs.retrieve(job.id).to_dict()["integrations"] == [wanted]
    assert _run(context, job.id, tmp_path / "run") == "succeeded"
    (path,) = (tmp_path / "curves").rglob("*tfevents*")
    assert path.parent.name == f"first-{job.id}"
    assert path.parent.parent.name == "mine"
    events = [(event.step, scalars(event)) for event in read_events(path) if scalars(event)]
    steps = [(step, values) for step, values in events if "train_loss" in values]
    assert [step for step, _ in steps] == [1, 2, 3, 4, 5, 6]
    # The script's losses are 1 / step, here as 32-bit floats.
    assert [round(values["train_loss"] * step, 5) for step, values in steps] == [1.0] * 6
    assert {"learning_rate", "grad_norm", "train_mean_token_accuracy", "epoch"} <= set(steps[0][1])
    scores = {step: values["valid_loss"] for step, values in events if "valid_loss" in values}
    assert scores == {0: 9.0, 2: 2.5, 4: 2.0, 6: 1.5}


def test_a_broken_tracker_costs_the_job_one_warning(
    client: openai.OpenAI, context: WorkerContext, broken: Broken, tmp_path: Path
) -> None:
    wanted = {"type": "broken", "broken": {"project": "p"}}
    tensorboard = {"type": "tensorboard", "tensorboard": {"project": "mine"}}
    job = _create(client, wanted, wanted | {}, tensorboard)
    assert _run(context, job.id, tmp_path / "run") == "succeeded"
    assert client.fine_tuning.jobs.retrieve(job.id).status == "succeeded"
    messages = [
        event for event in client.fine_tuning.jobs.list_events(job.id, limit=100) if event.level == "warn"
    ]
    # One for each of the two, whatever else they would have had to say.
    assert len(messages) <= 2
    assert all("broken" in event.message and "key@" not in event.message for event in messages)
    assert list((tmp_path / "curves").rglob("*tfevents*"))


def test_a_tracker_gets_the_outcome_of_the_job(
    client: openai.OpenAI, context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    statuses: list[str] = []

    class Run(Noted):
        def close(self, status: RunStatus) -> None:
            statuses.append(status)

    class Listening(Broken):
        def open(self, config: TrackerConfig, run: TrackedRun, settings: Settings) -> TrackerRun:
            return Run([])

    monkeypatch.setitem(discover(), "broken", Listening())
    job = _create(client, {"type": "broken", "broken": {"project": "p"}})
    prepare(context, job.id)
    failure = FailedEvent(job_id=job.id, code="non_finite_loss", message="The loss is not finite.")
    monkeypatch.setattr("worker.tasks.train.start_child", lambda *_: nullcontext(ScriptedChild([failure])))
    assert train_next(context)
    assert client.fine_tuning.jobs.retrieve(job.id).status == "failed"
    assert statuses == ["failed"]


def test_a_fault_is_reported_once_and_a_full_queue_blocks_no_job(
    monkeypatch: pytest.MonkeyPatch, settings: Settings
) -> None:
    monkeypatch.setattr(tracking, "_MAX_WAITING", 3)
    monkeypatch.setattr(tracking, "_LAST_WORDS_SECONDS", 0.05)
    tracker = Broken(hangs=True)
    thread = TrackerThread(tracker, TrackerConfig(project="p"), TrackedRun("j", "p", "b"), settings)
    followed = tracking.Tracking([thread], lambda: "succeeded")
    script = _events()
    messages: list[str] = []
    for event in script:
        followed.take(event, add_event=lambda message, **_: messages.append(message))
    assert messages == [
        "The integration broken does not follow this job: it is too slow, and some steps are left out"
    ]
    followed.end()
    tracker.may_go.set()


def _events() -> list[Any]:
    return [
        StepEvent(
            job_id="j",
            step=step,
            total_steps=20,
            epoch=0.1,
            metrics=Metrics(train_loss=1.0),
            learning_rate=0.1,
            grad_norm=1.0,
            num_tokens=1,
            num_supervised_tokens=1,
            tokens_per_second=1.0,
            seconds_left=1.0,
            peak_memory_bytes=1,
        )
        for step in range(1, 21)
    ]


def test_what_raises_is_reported_by_its_kind_alone(settings: Settings) -> None:
    with structlog.testing.capture_logs() as logs:
        thread = TrackerThread(Broken(), TrackerConfig(project="p"), TrackedRun("j", "p", "b"), settings)
        thread.join(30)
    (line,) = logs
    assert (line["event"], line["error_type"]) == ("tracker failed", "ConnectionError")
    assert line["raised_at"].startswith("test_tracking.py:")
    assert line["raised_at"].endswith(" open")
    assert "key@" not in repr(line)
    messages: list[str] = []
    followed = tracking.Tracking([thread], lambda: "failed")
    for event in _events():
        followed.take(event, add_event=lambda message, **_: messages.append(message))
    assert messages == ["The integration broken does not follow this job: it has failed with ConnectionError"]


def test_a_configuration_of_another_version_is_reported_without_its_words(context: WorkerContext) -> None:
    lease = Lease("j", 1, context.worker_id)
    spec = TrainingSpec(base_id="b", tuning={"type": "lora"}, seed=1)
    wanted = {"type": "tensorboard", "tensorboard": {"project": "mine", "token": "not-for-the-log"}}
    with structlog.testing.capture_logs() as logs:
        start_tracking(context, lease, "p", spec, [wanted]).end()
    assert [line["error_type"] for line in logs] == ["ValidationError"]
    assert "not-for-the-log" not in repr(logs)


def test_a_tracker_gets_parameters_and_metrics_and_no_text_of_a_user(
    client: openai.OpenAI, context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[TrackedRun] = []
    logged: list[tuple[int, Mapping[str, float]]] = []

    class Run(Noted):
        def log(self, step: int, metrics: Mapping[str, float]) -> None:
            logged.append((step, metrics))

    class Listening(Broken):
        def open(self, config: TrackerConfig, run: TrackedRun, settings: Settings) -> TrackerRun:
            opened.append(run)
            return Run([])

    monkeypatch.setitem(discover(), "broken", Listening())
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
    evaluation = Evaluation(
        step=3,
        epoch=1.0,
        valid_loss=0.5,
        valid_reward_accuracy=0.75,
        valid_reward_margin=1.5,
        general_loss=3.0,
        forgetting=0.125,
        answers=[SampleAnswer(prompt="secret words", answer="secret words")],
    )
    wanted = [{"type": "broken", "broken": {"project": "p"}}]
    lease = Lease(_create(client).id, 1, context.worker_id)
    followed = start_tracking(context, lease, "p", spec, wanted)
    event = EvaluatedEvent(job_id="j", evaluation=evaluation, report=script.report(3))
    followed.take(event, add_event=lambda *_args, **_facts: None)
    followed.end()
    (run,) = opened
    assert (
        run.parameters.items()
        >= {
            "objective": "dpo",
            "dpo.beta": 0.25,
            "parent": "ft:parent",
            "parent.digest": "sha256:1",
            "foundation": "ft:foundation",
            "foundation.digest": "sha256:2",
            "tuning.type": "prompt",
            "tuning.init": "text",
            "seed": 1,
        }.items()
    )
    assert logged == [
        (
            3,
            {
                "valid_loss": 0.5,
                "valid_reward_accuracy": 0.75,
                "valid_reward_margin": 1.5,
                "general_loss": 3.0,
                "forgetting": 0.125,
            },
        )
    ]
    assert "secret words" not in repr((opened, logged))


def test_all_that_waits_is_written_before_the_end(settings: Settings) -> None:
    steps: list[int] = []

    class Slow(Broken):
        def open(self, config: TrackerConfig, run: TrackedRun, settings: Settings) -> TrackerRun:
            return Noted(steps)

    thread = TrackerThread(Slow(), TrackerConfig(project="p"), TrackedRun("j", "p", "b"), settings)
    followed = tracking.Tracking([thread], lambda: "succeeded")
    for event in _events():
        followed.take(event, add_event=lambda *_args, **_facts: None)
    followed.end()
    assert steps == [*range(1, 21), -1]


def test_a_tracker_that_no_worker_has_is_refused(
    api: Api, client: openai.OpenAI, context: WorkerContext
) -> None:
    settings = api.state.settings.model_copy(update={"mlflow_tracking_uri": "http://mlflow.example"})
    object.__setattr__(api.state, "settings", settings)
    wanted = {"type": "mlflow", "mlflow": {"project": "p", "tags": ["a"]}}
    with context.database.transaction() as session:
        worker = session.get_one(Worker, context.worker_id)
        worker.facts = worker.facts | {"trackers": ["tensorboard"]}
    with pytest.raises(openai.BadRequestError) as caught:
        _create(client, wanted)
    assert (caught.value.param, caught.value.code) == ("integrations.0.type", "unsupported_value")
    assert "luthier[mlflow]" in str(caught.value)
    with context.database.transaction() as session:
        worker = session.get_one(Worker, context.worker_id)
        worker.facts = worker.facts | {"trackers": ["mlflow", "tensorboard"]}
    assert _create(client, wanted).status == "validating_files"


def test_the_sdks_own_wandb_integration_is_echoed_without_a_secret(api: Api) -> None:
    secret = SecretStr("not-for-clients")
    update = {"wandb_api_key": secret, "wandb_entity": "entity"}
    settings = api.state.settings.model_copy(update=update)
    object.__setattr__(api.state, "settings", settings)
    strict = openai.OpenAI(
        base_url=f"{api.base_url}/v1", api_key=api.key, max_retries=0, _strict_response_validation=True
    )
    file = strict.files.create(file=("rows.jsonl", jsonl(colour_rows(24))), purpose="fine-tune")
    wandb = {"project": "my-wandb-project", "entity": "entity", "name": "name", "tags": ["custom-tag"]}
    job = strict.fine_tuning.jobs.create(
        model="tiny-llama",
        training_file=file.id,
        integrations=[{"type": "wandb", "wandb": wandb}],  # type: ignore[typeddict-item]
    )
    assert job.integrations is not None
    assert job.integrations[0].wandb.model_dump() == wandb
    raw = httpx2.get(f"{api.base_url}/v1/fine_tuning/jobs/{job.id}", headers=api.headers)
    assert "not-for-clients" not in raw.text
    # The operator's key may write to more entities than the operator's own.
    refused = httpx2.post(
        f"{api.base_url}/v1/fine_tuning/jobs",
        headers=api.headers,
        json={
            "model": "tiny-llama",
            "training_file": file.id,
            "integrations": [{"type": "wandb", "wandb": wandb | {"entity": "another"}}],
        },
    )
    assert refused.json()["error"]["param"] == "integrations.0.wandb.entity"
