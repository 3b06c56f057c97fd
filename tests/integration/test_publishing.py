"""Which checkpoint becomes the model, what a job reports and which results it lists. The training process is
scripted; PostgreSQL, storage and the API are real."""

import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from db.tables import File, Model
from luthier.core.errors import ArtifactCorruptError, SelfCheckError
from luthier.core.events import CheckpointEvent, StoppedEvent
from tests.conftest import Api
from tests.integration.training_script import Script, run_script
from tests.rows import colour_rows
from tests.training import Jobs
from worker.maintenance import collect_garbage
from worker.training_process.supervisor import Ending


class Work:
    """One job, prepared, and what follows an attempt at it."""

    def __init__(self, api: Api, jobs: Jobs, folder: Path, job_id: str) -> None:
        self.api, self.jobs, self.folder, self.job_id = api, jobs, folder, job_id
        self.client, self.context = jobs.client, jobs.context

    def attempt(self, write: Callable[[Script], object], *, steps: int = 1, epochs: int = 5) -> Ending:
        return run_script(self.context, self.folder, write, steps=steps, epochs=epochs)

    def checkpoints(self) -> dict[int, str]:
        return self.jobs.checkpoints(self.job_id)

    def model(self) -> str:
        return str(self.jobs.get(self.job_id).fine_tuned_model)

    def messages(self) -> list[str]:
        return self.jobs.messages(self.job_id)

    def result_files(self) -> list[str]:
        return self.jobs.get(self.job_id).result_files

    def report(self) -> dict[str, Any]:
        return self.jobs.report(self.job_id)

    def artifacts(self) -> list[str]:
        """Return the objects of the job in storage after garbage collection, without what is in folders."""
        collect_garbage(self.context, grace_seconds=0)
        under = self.context.storage.local_root / "projects"
        files = [path for path in under.rglob("*") if path.is_file() and "files" not in path.parts]
        return sorted({path.parent.name if path.suffix != ".csv" else path.name for path in files})

    def content_of(self, model: str, name: str = "adapter_model.safetensors") -> bytes:
        return self.api.ask("GET", f"/models/{model}/files/{name}").content


@pytest.fixture
def start(api: Api, jobs: Jobs, tmp_path: Path) -> Callable[..., Work]:
    def make(**training: object) -> Work:
        options = {"training": {"validation_split": 0.2} | training, "hyperparameters": {}}
        job_id = jobs.prepared(rows=colour_rows(24), **options)
        return Work(api, jobs, tmp_path / job_id, job_id)

    return make


def _script(losses: list[float], result: int | None, *, first: int = 1) -> Callable[[Script], object]:
    """Return what writes an attempt from an epoch on; without a result it breaks off."""

    def write(script: Script) -> None:
        script.start((first - 1) * script.steps_an_epoch)
        for epoch, loss in enumerate(losses, start=first):
            script.epoch(epoch, loss)
        if result is not None:
            script.finish(result)

    return write


def test_the_last_checkpoint_is_the_model_and_published_once(start: Callable[..., Work]) -> None:
    work = start()
    assert work.attempt(_script([5, 4, 3, 2, 1], 5)) is Ending.SUCCEEDED
    assert list(work.checkpoints()) == [5, 4, 3]
    assert work.checkpoints()[5] == work.model()
    assert work.artifacts() == ["artifact", "step-000003", "step-000004", "step_metrics.csv"]
    assert work.content_of(work.model()) == b"weights of step 5"
    reported = f"Checkpoint created at step 5 with Snapshot ID: {work.model()}"
    assert work.messages().count(reported) == 1


def test_training_that_stopped_early_makes_its_last_checkpoint_the_model(start: Callable[..., Work]) -> None:
    work = start(patience=1)
    work.attempt(_script([5, 4, 3], 3))
    assert list(work.checkpoints()) == [3, 2, 1]
    assert work.checkpoints()[3] == work.model()
    assert work.artifacts() == ["step-000001", "step-000002", "step-000003", "step_metrics.csv"]
    assert work.content_of(work.model()) == b"weights of step 3"
    names = {model.id for model in work.client.models.list()}
    assert not [name for name in names if name.endswith(":ckpt-step-3")]


def test_the_best_checkpoint_outlives_newer_ones_and_becomes_the_model(start: Callable[..., Work]) -> None:
    work = start(keep_best=True)

    def write(script: Script) -> None:
        _script([5, 1, 2, 3, 4], 2)(script)
        # A look from outside just before the end: the process is about to say which one it is.
        script.events.insert(-1, script.events[-2])

    work.attempt(write)
    checkpoints = work.checkpoints()
    assert list(checkpoints) == [5, 4, 2]
    assert checkpoints[2] == work.model()
    assert checkpoints[5].endswith(":ckpt-step-5")
    assert work.content_of(work.model()) == b"weights of step 2"
    assert work.content_of(checkpoints[5]) == b"weights of step 5"
    assert work.artifacts() == ["step-000002", "step-000004", "step-000005", "step_metrics.csv"]
    checkpoint = work.client.fine_tuning.jobs.checkpoints.list(work.job_id).data[-1]
    assert (checkpoint.step_number, checkpoint.metrics.full_valid_loss) == (2, 1)
    assert checkpoint.metrics.valid_loss == 1
    messages = work.messages()
    assert "The checkpoint of step 2 is the model, now under the model's name" in messages
    assert len([message for message in messages if message.startswith("New fine-tuned model created")]) == 1


def test_the_best_checkpoint_so_far_stays_callable_during_training(start: Callable[..., Work]) -> None:
    work = start(keep_best=True)
    work.attempt(_script([1.0, 5.0, 4.0, 3.0], None), epochs=6)
    assert list(work.checkpoints()) == [4, 3, 1]
    assert work.content_of(work.checkpoints()[1]) == b"weights of step 1"
    assert work.attempt(_script([2.0, 2.0], 1, first=5), epochs=6) is Ending.SUCCEEDED
    assert list(work.checkpoints()) == [6, 5, 1]
    assert work.checkpoints()[1] == work.model()
    # The card of a checkpoint of the attempt before has another name on it, so the model has its own.
    assert work.artifacts() == ["artifact", "step-000005", "step-000006", "step_metrics.csv"]
    assert work.content_of(work.model(), "README.md") == b"made in e3 as artifact"


def test_a_checkpoint_that_its_user_deleted_can_still_become_the_model(start: Callable[..., Work]) -> None:
    work = start(keep_best=True)
    work.attempt(_script([1.0, 5.0], None), epochs=3)
    work.client.models.delete(work.checkpoints()[1])
    collect_garbage(work.context, grace_seconds=0)
    work.attempt(_script([2.0], 1, first=3), epochs=3)
    assert work.checkpoints()[1] == work.model()
    assert work.content_of(work.model()) == b"weights of step 1"
    with work.context.database.transaction() as session:
        model = session.query(Model).filter_by(name=work.model()).one()
        assert (model.deleted_at, model.bytes_deleted_at) == (None, None)
    work.client.models.delete(work.model())


def test_every_evaluation_is_reported_once_with_scores_and_no_answers(start: Callable[..., Work]) -> None:
    work = start()
    work.attempt(_script([5, 4, 3, 2, 1], 5))
    events = work.client.fine_tuning.jobs.list_events(work.job_id, limit=100).data[::-1]
    reported = [event for event in events if "general loss" in event.message]
    assert [event.message for event in reported[:2]] == [
        "Base model: validation loss=9.00, general loss=3.00",
        "Evaluation at step 1: validation loss=5.00, general loss=3.00, forgetting=0.12",
    ]
    assert len(reported) == 6
    assert reported[0].to_dict()["data"]["base"]["valid_loss"] == 9.0
    assert reported[1].to_dict()["data"]["evaluation"] == {
        "step": 1,
        "epoch": 1.0,
        "valid_loss": 5.0,
        "general_loss": 3.0,
        "forgetting": 0.125,
    }
    assert not [event for event in events if "secret" in event.to_json()]


def test_the_report_has_both_parts_with_the_seconds_of_tokenizing(start: Callable[..., Work]) -> None:
    work = start()
    before = work.report()
    assert before["run"] is None
    assert before["prepare"]["training"]["num_rows"] == 24
    assert before["prepare"]["validation"] is None
    assert before["prepare"]["tokenize_seconds"] > 0
    work.attempt(_script([5, 4, 3, 2, 1], 5))
    run = work.report()["run"]
    assert run["result_step"] == 5
    assert run["seconds"] == {
        "load": 1.0,
        "tokenize": before["prepare"]["tokenize_seconds"],
        "train": 2.0,
        "evaluate": 0.0,
        "save": 0.0,
    }
    answers = run["evaluations"][1]["answers"]
    assert answers == [{"prompt": "who?", "answer": "\ufffd secret words of step 1"}]


def test_the_report_is_there_before_any_worker_and_hidden_from_other_projects(api: Api, jobs: Jobs) -> None:
    job_id = jobs.create()
    path = f"/fine_tuning/jobs/{job_id}/report"
    report = api.ok("GET", path)
    assert report == {
        "object": "fine_tuning.job.report",
        "fine_tuning_job_id": job_id,
        "prepare": None,
        "run": None,
    }
    schemas = httpx2.get(f"{api.base_url}/openapi.json").json()["components"]["schemas"]
    assert set(schemas["JobReport"]["properties"]) == set(report)
    assert {"evaluations", "stopped_early", "peak_memory_bytes"} < set(schemas["RunReport"]["properties"])
    assert api.other_project().refused("GET", path)[:2] == (404, "not_found")


def test_old_steps_of_a_long_job_are_thinned_in_its_events_and_its_file(start: Callable[..., Work]) -> None:
    work = start()
    # An evaluation at step 3,001, which one in 10 and one in 100 leave out.
    work.attempt(_script([3.0, 2.0], 2), steps=3001, epochs=2)
    listed = work.client.fine_tuning.jobs.list_events(work.job_id, limit=100)
    steps = [event.data["step"] for event in listed if event.type == "metrics"][::-1]
    assert len(steps) < 3000
    assert steps == sorted(set(steps))
    assert 3001 in steps
    assert {step for step in steps if step <= 4000 and step != 3001} == set(range(10, 4001, 10))
    assert steps[-990:] == list(range(6002 - 989, 6003))
    [file_id] = work.result_files()
    rows = csv.DictReader(io.StringIO(work.client.files.content(file_id).read().decode()))
    assert [int(row["step"]) for row in rows] == steps


def test_step_metrics_are_a_file_of_the_jobs_project_with_a_row_a_step(start: Callable[..., Work]) -> None:
    work = start()
    work.attempt(_script([4.0], None), steps=2, epochs=2)
    assert work.result_files() == []
    # The second attempt continues from step 1, so it does step 2 again.
    work.attempt(_script([3.0, 2.0], 2), steps=2, epochs=2)
    [file_id] = work.result_files()
    file = work.client.files.retrieve(file_id)
    assert (file.purpose, file.filename, file.status) == (
        "fine-tune-results",
        "step_metrics.csv",
        "processed",
    )
    listed = work.client.files.list(purpose="fine-tune-results")
    assert [entry.id for entry in listed] == [file_id]
    collect_garbage(work.context, grace_seconds=0)
    content = work.client.files.content(file_id).read()
    assert len(content) == file.bytes
    rows = list(csv.DictReader(io.StringIO(content.decode())))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert list(rows[0])[:5] == [
        "step",
        "train_loss",
        "train_accuracy",
        "valid_loss",
        "valid_mean_token_accuracy",
    ]
    assert (rows[0]["valid_loss"], rows[1]["valid_loss"], rows[3]["full_valid_loss"]) == ("", "3.0", "2.0")
    assert rows[2]["train_accuracy"] == rows[2]["train_mean_token_accuracy"] == "0.5"
    with pytest.raises(openai.BadRequestError) as refused:
        work.client.fine_tuning.jobs.create(model="tiny-llama", training_file=file_id)
    assert refused.value.code == "invalid_file_purpose"
    work.client.files.delete(file_id)
    assert work.result_files() == []
    assert work.artifacts() == ["artifact", "step-000002"]


def test_a_crash_between_bytes_and_row_leaves_nothing_that_shows(
    start: Callable[..., Work], monkeypatch: pytest.MonkeyPatch
) -> None:
    work = start()

    def crash(*_: object, **__: object) -> None:
        raise ArtifactCorruptError("the worker dies here")

    with monkeypatch.context() as patched:
        patched.setattr("worker.training_process.publish.leases.leave", crash)
        with pytest.raises(ArtifactCorruptError):
            work.attempt(_script([5, 4, 3, 2, 1], 5))
    job = work.jobs.row(work.job_id)
    assert (job.status, job.fine_tuned_model, job.result_file_id) == ("running", None, None)
    with work.context.database.transaction() as session:
        assert session.query(File).filter_by(purpose="fine-tune-results").count() == 0
        assert session.query(Model).filter_by(kind="tuned").count() == 0
    work.client.fine_tuning.jobs.cancel(work.job_id)
    assert work.artifacts() == ["step-000002", "step-000003", "step-000004"]


def test_a_save_point_that_is_reported_twice_is_kept_once_and_stays_whole(
    start: Callable[..., Work], tmp_path: Path
) -> None:
    def write(script: Script) -> None:
        script.start().save_point(1, "one").save_point(1, "one").save_point(2, "two")
        script.events.append(StoppedEvent(job_id=script.job_id, step=2))

    work = start()
    assert work.attempt(write) is Ending.REQUEUED
    kept = work.jobs.row(work.job_id).save_points
    # No step was reported beside them.
    assert work.jobs.row(work.job_id).step == 2
    assert [entry["step"] for entry in kept] == [1, 2]
    for entry, content in zip(kept, ("one", "two"), strict=True):
        work.context.storage.fetch_folder(entry["key"], tmp_path / content)
        assert (tmp_path / content / "state.json").read_text() == content


@pytest.mark.parametrize("how", ["above", "absolute", "link"])
def test_a_process_that_names_a_folder_of_another_publishes_and_deletes_nothing(
    start: Callable[..., Work], tmp_path: Path, how: str
) -> None:
    """Such as another project's model, which it can read where storage is on the same disk."""
    others = tmp_path / "others"

    def write(script: Script) -> None:
        script.start().epoch(1, 5.0)
        (event,) = [event for event in script.events if isinstance(event, CheckpointEvent)]
        (script.run_dir / event.path).rename(others)
        (script.run_dir / "link").symlink_to(others)
        path = {"above": f"../{others.name}", "absolute": str(others), "link": "link"}[how]
        script.events[script.events.index(event)] = event.model_copy(update={"path": path})

    work = start()
    with pytest.raises(SelfCheckError, match="outside of its run directory"):
        work.attempt(write)
    assert (others / "manifest.json").exists()
    assert work.checkpoints() == {}
