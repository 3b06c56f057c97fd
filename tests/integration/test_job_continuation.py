"""Jobs that continue tuned models, with real PostgreSQL, storage and API; one of them trained for real."""

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy import select, update

from db.tables import Model
from luthier.core.events import StoppedEvent
from luthier.core.specs import TrainingSpec
from tests.conftest import Api
from tests.integration.training_script import Script, run_script
from tests.training import Jobs, train_next
from worker.context import WorkerContext
from worker.maintenance import collect_garbage
from worker.processes import work
from worker.tasks.model_inputs import fetch_parents
from worker.tasks.prepare import prepare
from worker.training_process.supervisor import Ending


class ScriptedJobs(Jobs):
    """Jobs over one file, and models of them by a scripted training process."""

    def __init__(self, client: openai.OpenAI, context: WorkerContext, folder: Path) -> None:
        super().__init__(client, context)
        self.folder, self.file_id = folder, self.upload()

    def create(self, model: str = "tiny-llama", **body: Any) -> str:
        return super().create(model, file_id=self.file_id, **({"hyperparameters": {"n_epochs": 1}} | body))

    def refused(self, model: str, **extra: Any) -> tuple[int, str | None, str | None]:
        with pytest.raises(openai.APIStatusError) as caught:
            self.create(model, **extra)
        return caught.value.status_code, caught.value.code, caught.value.param

    def attempt(self, job_id: str, write: Callable[[Script], object], epochs: int = 1) -> Ending:
        claimed = self.claim()
        assert claimed.lease.job_id == job_id
        return run_script(self.context, self.folder / job_id, write, epochs=epochs, claimed=claimed)

    def finish(self, job_id: str, *, epochs: int = 1) -> str:
        """Prepare a job, let it succeed, and return its model's name."""
        prepare(self.context, job_id)

        def write(script: Script) -> None:
            script.start()
            for epoch in range(1, epochs + 1):
                script.epoch(epoch, 1.0)
            script.finish(epochs)

        assert self.attempt(job_id, write, epochs) is Ending.SUCCEEDED
        return self.name(job_id)

    def name(self, job_id: str) -> str:
        return str(self.succeeded(job_id).fine_tuned_model)

    def model(self, name: str) -> Model:
        with self.context.database.transaction() as session:
            return session.scalars(select(Model).where(Model.name == name)).one()

    def spec(self, job_id: str) -> TrainingSpec:
        return TrainingSpec.model_validate(self.row(job_id).spec)

    def kept(self, name: str) -> str:
        """Ask for a model's end, which must be refused; return why."""
        with pytest.raises(openai.BadRequestError) as caught:
            self.client.models.delete(name)
        assert (caught.value.code, caught.value.param) == ("model_in_use", "model")
        key = self.model(name).artifact_key
        assert self.context.storage.read_manifest(key).digest == self.model(name).artifact_digest
        return str(caught.value)


@pytest.fixture
def jobs(client: openai.OpenAI, context: WorkerContext, tmp_path: Path) -> ScriptedJobs:
    return ScriptedJobs(client, context, tmp_path / "scripted")


def test_a_job_continues_a_model_through_the_real_training_process(
    api: Api, client: openai.OpenAI, context: WorkerContext, jobs: ScriptedJobs
) -> None:
    first = jobs.create(tuning={"rank": 2, "target_modules": ["q_proj", "v_proj"]})
    work(context)
    parent = jobs.name(first)
    second = jobs.create(parent, suffix="more")
    shown = api.ask("GET", f"/fine_tuning/jobs/{second}").json()
    assert shown["model"] == "tiny-llama"
    assert shown["started_from"] == {"name": parent, "digest": jobs.model(parent).artifact_digest}
    assert (shown["tuning"]["rank"], shown["tuning"]["target_modules"]) == (2, ["q_proj", "v_proj"])
    work(context)
    child = jobs.model(jobs.name(second))
    assert child.name.startswith("ft:tiny-llama:personal:more:")
    assert child.parent_model_id == jobs.model(parent).id
    assert (child.full_model_id, child.base_digest) == (None, jobs.model(parent).base_digest)

    report = jobs.report(second)["run"]
    assert report["started_from"] == shown["started_from"]
    # Training began with the parent's weights: its scores at the end are those of the child's start.
    before = jobs.report(first)["run"]
    assert report["evaluations"][0]["general_loss"] == before["evaluations"][-1]["general_loss"]
    assert report["base_evaluation"]["general_loss"] == before["evaluations"][0]["general_loss"]
    messages = jobs.messages(second)
    assert any(message.startswith(f"Start, {parent}: general loss=") for message in messages)
    assert any(message.startswith("Base model: general loss=") for message in messages)

    assert child.name in jobs.kept(parent)
    client.models.delete(child.name)
    client.models.delete(parent)


def test_a_contradiction_names_its_member_and_both_values(jobs: ScriptedJobs) -> None:
    parent = jobs.finish(jobs.create(tuning={"rank": 4}))
    assert jobs.refused(parent, tuning={"rank": 8}) == (400, "invalid_value", "tuning.rank")
    assert jobs.refused(parent, tuning={"type": "adapter"}) == (400, "invalid_value", "tuning.type")
    assert jobs.refused(parent, tuning={"colour": 1}) == (400, "unknown_parameter", "tuning.colour")
    job_id = jobs.create(parent, tuning={"type": "lora", "rank": 4, "alpha": "auto", "dropout": 0.1})
    tuning = jobs.spec(job_id).tuning
    assert (tuning["rank"], tuning["alpha"], tuning["dropout"]) == (4, 8.0, 0.1)


def test_an_estimate_takes_a_tuned_model_as_a_create_does(api: Api, jobs: ScriptedJobs) -> None:
    parent = jobs.finish(jobs.create(tuning={"rank": 2}))
    path = "/fine_tuning/jobs/estimate"
    body = {"model": parent, "training_file": jobs.file_id}
    found = api.ask("POST", path, body=body).json()
    assert (found["model"], found["tuning"]["rank"]) == ("tiny-llama", 2)
    refused = api.ask("POST", path, body=body | {"tuning": {"rank": 3}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tuning.rank")


def test_a_model_of_another_project_is_as_unknown_as_any(api: Api, jobs: ScriptedJobs) -> None:
    parent = jobs.finish(jobs.create())
    other = api.client(api.make_key()["key"])
    said = []
    for name in (parent, parent[:-1] + "?"):
        with pytest.raises(openai.BadRequestError) as caught:
            other.fine_tuning.jobs.create(model=name, training_file="file-x")
        assert (caught.value.code, caught.value.param) == ("model_not_available", "model")
        said.append(caught.value.message.replace(name, "NAME"))
    assert said[0] == said[1]
    jobs.client.models.delete(parent)
    assert jobs.refused(parent) == (400, "model_not_available", "model")


def test_a_model_stays_while_an_unfinished_job_starts_from_it(
    client: openai.OpenAI, context: WorkerContext, jobs: ScriptedJobs
) -> None:
    parent = jobs.finish(jobs.create())
    job_id = jobs.create(parent)
    assert job_id in jobs.kept(parent)
    prepare(context, job_id)
    assert job_id in jobs.kept(parent)
    jobs.cancel(job_id)
    assert client.models.delete(parent).deleted
    collect_garbage(context, grace_seconds=0)


def test_the_first_ten_heirs_are_named_and_how_many_more_there_are(jobs: ScriptedJobs) -> None:
    parent = jobs.finish(jobs.create())
    heir = jobs.finish(jobs.create(parent))
    columns = {column.key: getattr(jobs.model(heir), column.key) for column in Model.__mapper__.column_attrs}
    heirs = [heir, *(f"{heir}:{number:02}" for number in range(11))]
    with jobs.context.database.transaction() as session:
        for name in heirs[1:]:
            later = columns["created_at"] + timedelta(seconds=len(name) + int(name[-2:]))
            session.add(Model(**columns | {"id": f"model_{name[-2:]}", "name": name, "created_at": later}))
    message = jobs.kept(parent)
    assert f"{', '.join(heirs[:10])} and 2 more have been tuned from it" in message
    assert heirs[10] not in message


def test_a_base_and_its_other_name_are_never_deleted(client: openai.OpenAI, jobs: ScriptedJobs) -> None:
    jobs.finish(jobs.create())
    for name in ("tiny-llama", "gpt-4o-mini-2024-07-18"):
        with pytest.raises(openai.PermissionDeniedError):
            client.models.delete(name)


def test_a_method_on_a_whole_model_is_served_on_it_and_keeps_its_bytes(
    api: Api, client: openai.OpenAI, jobs: ScriptedJobs
) -> None:
    whole = jobs.finish(jobs.create(tuning={"type": "full"}))
    on_whole = jobs.finish(jobs.create(whole, tuning={"type": "lora", "rank": 2}))
    further = jobs.finish(jobs.create(on_whole))
    rows = [jobs.model(name) for name in (whole, on_whole, further)]
    assert [row.full_model_id for row in rows] == [None, rows[0].id, rows[0].id]
    assert [row.parent_model_id for row in rows] == [None, rows[0].id, rows[1].id]
    # After a whole model, and no type said, the whole model is tuned further.
    assert jobs.spec(jobs.create(whole)).tuning["type"] == "full"
    assert jobs.spec(jobs.create(whole)).foundation is None
    api.backend.asked.clear()
    chat = {"model": further, "messages": [{"role": "user", "content": "hi"}]}
    api.ask("POST", "/chat/completions", body=chat)
    target = api.backend.asked[0][2]
    assert (target.artifact, target.digest) == (rows[2].artifact_key, rows[2].artifact_digest)
    assert (target.full_model, target.full_model_digest) == (rows[0].artifact_key, rows[0].artifact_digest)
    for job in client.fine_tuning.jobs.list():
        if job.finished_at is None:
            jobs.cancel(job.id)
    assert on_whole in jobs.kept(whole)
    assert further in jobs.kept(on_whole)
    client.models.delete(further)
    client.models.delete(on_whole)
    client.models.delete(whole)


def test_a_checkpoint_that_a_job_starts_from_is_not_retired(jobs: ScriptedJobs) -> None:
    first = jobs.create(hyperparameters={"n_epochs": 6})
    prepare(jobs.context, first)

    def begin(script: Script) -> None:
        script.start().epoch(1, 3.0).epoch(2, 2.0)
        script.events.append(StoppedEvent(job_id=first, step=2))

    assert jobs.attempt(first, begin, epochs=6) is Ending.REQUEUED
    checkpoint = jobs.checkpoints(first)[1]
    child = jobs.create(checkpoint)

    def continue_from(script: Script) -> None:
        script.start(2)
        for epoch in range(3, 7):
            script.epoch(epoch, 1 / epoch)
        script.finish(6)

    assert jobs.attempt(first, continue_from, epochs=6) is Ending.SUCCEEDED
    # The usual three, and the one that is needed.
    assert list(jobs.checkpoints(first)) == [6, 5, 4, 1]
    collect_garbage(jobs.context, grace_seconds=0)
    assert child in jobs.kept(checkpoint)


def test_a_parent_whose_bytes_are_gone_or_others_fails_the_job_and_nothing_is_trained(
    context: WorkerContext, jobs: ScriptedJobs
) -> None:
    parent = jobs.finish(jobs.create())
    other = jobs.model(jobs.finish(jobs.create(hyperparameters={"n_epochs": 2}), epochs=2)).artifact_key
    own = jobs.model(parent).artifact_key

    def put(key: str) -> None:
        with context.database.transaction() as session:
            session.execute(update(Model).where(Model.name == parent).values(artifact_key=key))

    for key, code in ((f"{other}/nothing", "artifact_corrupt"), (other, "unsuitable_parent")):
        for is_seen_by_prepare in (True, False):
            put(key if is_seen_by_prepare else own)
            job_id = jobs.create(parent)
            prepare(context, job_id)
            put(key)
            assert train_next(context) is not is_seen_by_prepare
            assert jobs.error(job_id).code == code


@pytest.mark.parametrize("is_reported_again", [True, False], ids=["as a checkpoint", "as the result"])
def test_a_checkpoint_that_others_build_on_keeps_its_weights_when_its_step_is_done_again_otherwise(
    is_reported_again: bool, client: openai.OpenAI, context: WorkerContext, jobs: ScriptedJobs, tmp_path: Path
) -> None:
    job_id = jobs.create(training={"precision": "float32", "keep_best": True, "validation_split": 0.1})
    prepare(context, job_id)
    jobs.attempt(job_id, lambda script: script.start().epoch(1, 1.0), epochs=2)
    [old] = jobs.checkpoints(job_id).values()
    before = jobs.model(old)
    child_id = jobs.create(old)

    def again(script: Script) -> None:
        script.weights = "other weights"
        script.start(0 if is_reported_again else 1)
        if is_reported_again:
            script.epoch(1, 1.0)
        script.epoch(2, 5.0)
        script.finish(1)

    assert jobs.attempt(job_id, again, epochs=2) is Ending.SUCCEEDED
    collect_garbage(context, grace_seconds=0)
    kept = jobs.model(old)
    assert (kept.artifact_key, kept.artifact_digest) == (before.artifact_key, before.artifact_digest)
    assert child_id in jobs.kept(old)
    fetch_parents(context, jobs.spec(child_id), tmp_path / "run")
    content = (tmp_path / "run" / "parent" / "adapter_model.safetensors").read_bytes()
    assert content == b"weights of step 1"
    # The step that was done again has a model of its own, which is the job's.
    result = jobs.model(jobs.name(job_id))
    assert (result.kind, result.id != before.id) == ("tuned", True)
    assert context.storage.read_manifest(result.artifact_key).digest == result.artifact_digest
    assert result.artifact_digest != before.artifact_digest
    checkpoints = jobs.checkpoints(job_id)
    assert checkpoints[1] == result.name
    assert old not in checkpoints.values()
    # Once no job needs it, it can be deleted as any model.
    jobs.cancel(child_id)
    client.models.delete(old)
    client.models.delete(result.name)
