"""A job from its files to a model, with real PostgreSQL, real storage and the real training process."""

import json
import os
import signal
import threading
from pathlib import Path

import httpx2
import pytest
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError

from db.tables import Model
from tests.conftest import Api, wait_until
from tests.rows import chat_row, colour_rows
from tests.training import Jobs, train_next
from worker.context import WorkerContext
from worker.maintenance import collect_garbage
from worker.processes import work

SHORT = {
    "training": {"precision": "float32", "save_every_steps": 2},
    "hyperparameters": {"n_epochs": 2, "batch_size": 4},
}


def test_a_job_becomes_a_model_that_peft_loads(api: Api, jobs: Jobs, tmp_path: Path) -> None:
    options = SHORT | {"training": {"validation_split": 0.2}}
    job_id = jobs.create(rows=colour_rows(24), suffix="mine", **options)
    work(jobs.context)
    job = jobs.succeeded(job_id)
    assert job.fine_tuned_model.startswith("ft:tiny-llama:personal:mine:")
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, 4)
    assert isinstance(job.trained_tokens, int)
    assert job.finished_at is not None

    last, first = jobs.client.fine_tuning.jobs.checkpoints.list(job_id).data
    assert last.step_number > first.step_number
    assert last.fine_tuned_model_checkpoint == job.fine_tuned_model
    assert first.fine_tuned_model_checkpoint.endswith(f":ckpt-step-{first.step_number}")
    assert last.metrics.full_valid_loss is not None

    # The first job on a base has it fetched.
    messages = [m for m in jobs.messages(job_id) if not m.startswith("Fetching the base model")]
    assert messages[2:4] == ["Files validated, moving job to queued state", "Fine-tuning job started"]
    assert messages[-2:] == [
        f"New fine-tuned model created: {job.fine_tuned_model}",
        "The job has successfully completed",
    ]
    assert len([message for message in messages if message.startswith("Step ")]) == last.step_number

    path = f"/models/{job.fine_tuned_model}/files"
    listed = api.ok("GET", path)["data"]
    folder = tmp_path / "download"
    folder.mkdir()
    for entry in listed:
        answer = api.ask("GET", f"{path}/{entry['name']}")
        assert len(answer.content) == entry["bytes"]
        (folder / entry["name"]).write_bytes(answer.content)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-llama"
    _assert_peft_loads(jobs.context.settings.bases_dir / "tiny-llama", folder)

    collect_garbage(jobs.context, grace_seconds=0)
    files = [path for path in (jobs.context.storage.local_root / "projects").rglob("*") if path.is_file()]
    kept = {path.name if path.suffix == ".csv" else path.parent.name for path in files} - {"files"}
    assert kept == {"artifact", f"step-{first.step_number:06d}", "step_metrics.csv"}

    _assert_hidden_from_another_project(api, job.fine_tuned_model)
    jobs.client.models.delete(job.fine_tuned_model)
    assert api.ask("GET", path).status_code == 404


def _assert_hidden_from_another_project(api: Api, model: str) -> None:
    other = api.other_project()
    chat = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
    for method, path, content in (
        ("GET", f"/models/{model}", None),
        ("DELETE", f"/models/{model}", None),
        ("GET", f"/models/{model}/files", None),
        ("GET", f"/models/{model}/files/adapter_config.json", None),
        ("POST", "/chat/completions", chat),
        ("POST", "/completions", {"model": model, "prompt": "hi"}),
        ("POST", "/responses", {"model": model, "input": "hi"}),
    ):
        assert other.refused(method, path, content)[:2] == (404, "model_not_found"), path
    assert model not in other.ask("GET", "/models").text
    assert api.backend.asked == []


def _assert_peft_loads(base: Path, folder: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    tokens = torch.arange(10)[None]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = model(tokens).logits.detach().clone()
    tuned = PeftModel.from_pretrained(model, str(folder))
    assert not torch.allclose(tuned(tokens).logits, before)


def test_live_events_arrive_in_order_and_end_with_done(api: Api, jobs: Jobs, context: WorkerContext) -> None:
    job_id = jobs.create()
    url = f"{api.base_url}/v1/fine_tuning/jobs/{job_id}/events?stream=true"
    lines: list[str] = []

    def follow() -> None:
        with httpx2.stream("GET", url, headers=api.headers, timeout=60) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            lines.extend(answer.iter_lines())

    reader = threading.Thread(target=follow)
    reader.start()
    work(context)
    reader.join(timeout=30)
    assert not reader.is_alive()
    ids = [int(line[4:]) for line in lines if line.startswith("id: ")]
    assert ids == list(range(1, len(ids) + 1))
    data = [line[6:] for line in lines if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    assert json.loads(data[-2])["message"] == "The job has successfully completed"
    metrics = [event for event in map(json.loads, data[:-1]) if event["type"] == "metrics"]
    assert {"step", "total_steps", "train_loss", "tokens_per_second", "seconds_left"} <= set(
        metrics[0]["data"]
    )

    again = httpx2.get(url, headers=api.headers | {"Last-Event-ID": str(ids[-3])})
    assert [int(line[4:]) for line in again.text.splitlines() if line.startswith("id: ")] == ids[-2:]


@pytest.mark.parametrize(
    ("rows", "body", "reported"),
    [
        ([*colour_rows(10), chat_row("a", "b", weight=0)], {}, "Line 11"),
        ([*colour_rows(10), chat_row("a " * 400, "b")], {}, "Line 11"),
        (colour_rows(10), {"training": {"validation_split": 0.3}}, "at least 10"),
    ],
    ids=["a row with nothing supervised", "a row over the context", "too few rows left"],
)
def test_rows_that_cannot_be_trained_on_fail_the_job_by_line(
    jobs: Jobs, rows: list[dict[str, object]], body: dict[str, object], reported: str
) -> None:
    job_id = jobs.create(rows=rows, **body)
    work(jobs.context)
    error = jobs.error(job_id)
    assert (error.code, error.param) == ("invalid_training_file", "training_file")
    assert reported.lower() in error.message.lower(), error.message
    assert jobs.get(job_id).fine_tuned_model is None


def _child_pid(job_id: str) -> int | None:
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                command = (process / "cmdline").read_bytes()
            except OSError:
                continue
            if b"luthier.training" in command and job_id.encode() in command:
                return int(process.name)
    return None


def _prepare_long_job(jobs: Jobs, n_epochs: int = 8) -> str:
    options = SHORT | {"hyperparameters": {"n_epochs": n_epochs, "batch_size": 1}}
    # A process of its own, which is found by its command line.
    jobs.context.fork_server = None
    return jobs.prepared(rows=colour_rows(40), **options)


def test_a_killed_child_resumes_from_its_save_point_to_the_same_bytes(jobs: Jobs) -> None:
    disturbed = _prepare_long_job(jobs, n_epochs=3)
    run = jobs.start_training(disturbed, until_step=10)
    os.kill(_child_pid(disturbed), signal.SIGKILL)
    run.join(timeout=60)
    assert jobs.status(disturbed) == "queued"
    work(jobs.context)
    job = jobs.succeeded(disturbed)
    messages = jobs.messages(disturbed)
    assert any("ended by signal 9" in message for message in messages)
    assert any(message.startswith("Resuming from the save point at step") for message in messages)
    assert [model.id for model in jobs.client.models.list()].count(job.fine_tuned_model) == 1

    undisturbed = _prepare_long_job(jobs, n_epochs=3)
    work(jobs.context)
    jobs.succeeded(undisturbed)
    with jobs.context.database.transaction() as session:
        first, second = session.scalars(select(Model.artifact_digest).where(Model.kind == "tuned"))
    assert first == second


def test_a_stopping_worker_gives_the_job_back_at_a_save_point(jobs: Jobs) -> None:
    job_id = _prepare_long_job(jobs)
    run = jobs.start_training(job_id, until_step=5)
    jobs.context.stopping.set()
    run.join(timeout=30)
    job = jobs.row(job_id)
    assert (job.status, job.lease_owner, job.num_crashes) == ("queued", None, 0)
    assert job.save_points
    assert jobs.outcomes(job_id) == ["prepared", "given_back"]
    assert _child_pid(job_id) is None


def test_cancel_ends_the_child_and_publishes_nothing(jobs: Jobs) -> None:
    job_id = _prepare_long_job(jobs)
    run = jobs.start_training(job_id, until_step=5)
    assert jobs.cancel(job_id) == "cancelled"
    run.join(timeout=5)
    assert not run.is_alive(), "the attempt continues after its job was cancelled"
    assert _child_pid(job_id) is None
    assert (jobs.status(job_id), jobs.get(job_id).fine_tuned_model) == ("cancelled", None)


def test_a_job_that_always_crashes_fails_in_the_end(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = _prepare_long_job(jobs)
    monkeypatch.setattr("sys.executable", "/bin/false")
    # The job's processes die, and the machine is well.
    monkeypatch.setattr("worker.quarantine.test_machine", lambda _: None)
    for _ in range(3):
        wait_until(lambda: train_next(jobs.context), what="the next attempt's time has come")
    assert not train_next(jobs.context)
    assert jobs.error(job_id).code == "worker_crashed"
    assert "attempt 3 of 3" in jobs.error(job_id).message


def test_the_database_refuses_an_illegal_change_of_status(jobs: Jobs) -> None:
    job_id = jobs.create()
    jobs.cancel(job_id)
    with pytest.raises(IntegrityError, match="can not go from cancelled to running"):
        jobs.change(job_id, status="running")
