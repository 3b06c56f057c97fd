"""A job from its files to a model, with real PostgreSQL, real storage and the real training process."""

import json
import os
import signal
import threading
from pathlib import Path

import httpx2
import openai
import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from db.tables import Attempt, Job, JobEvent, Model
from luthier.core.errors import WorkerCrashedError
from services.jobs import leases
from services.jobs.leases import LeaseLostError
from tests.conftest import Api, wait_until
from tests.rows import chat_row, colour_rows, jsonl
from tests.training import train_next
from worker.app import sweep
from worker.context import WorkerContext, make_context
from worker.maintenance import collect_garbage
from worker.processes import work
from worker.tasks.prepare import prepare


@pytest.fixture
def client(api: Api) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{api.base_url}/v1", api_key=api.key, max_retries=0)


def _create(client: openai.OpenAI, rows: list[dict[str, object]], **body: object) -> str:
    file = client.files.create(file=("rows.jsonl", jsonl(rows)), purpose="fine-tune")
    extra = {
        "training": {"precision": "float32", "save_every_steps": 2},
        "hyperparameters": {"n_epochs": 2, "batch_size": 4},
    } | body
    return client.fine_tuning.jobs.create(
        model="tiny-llama", training_file=file.id, seed=1, extra_body=extra
    ).id


def _messages(client: openai.OpenAI, job_id: str) -> list[str]:
    return [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100)][::-1]


def test_a_job_becomes_a_model_that_peft_loads(
    api: Api, client: openai.OpenAI, context: WorkerContext, tmp_path: Path
) -> None:
    job_id = _create(client, colour_rows(24), training={"validation_split": 0.2}, suffix="mine")
    work(context)
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert job.status == "succeeded", job.error
    assert job.fine_tuned_model is not None
    assert job.fine_tuned_model.startswith("ft:tiny-llama:personal:mine:")
    assert (job.hyperparameters.n_epochs, job.hyperparameters.batch_size) == (2, 4)
    assert isinstance(job.trained_tokens, int)
    assert job.finished_at is not None

    checkpoints = client.fine_tuning.jobs.checkpoints.list(job_id).data
    assert [checkpoint.step_number for checkpoint in checkpoints] == sorted(
        (checkpoint.step_number for checkpoint in checkpoints), reverse=True
    )
    assert len(checkpoints) == 2
    assert checkpoints[0].fine_tuned_model_checkpoint == job.fine_tuned_model
    assert checkpoints[1].fine_tuned_model_checkpoint.endswith(f":ckpt-step-{checkpoints[1].step_number}")
    assert checkpoints[0].metrics.full_valid_loss is not None

    # The first job on a base has it fetched.
    messages = [m for m in _messages(client, job_id) if not m.startswith("Fetching the base model")]
    assert messages[2:4] == ["Files validated, moving job to queued state", "Fine-tuning job started"]
    assert messages[-2:] == [
        f"New fine-tuned model created: {job.fine_tuned_model}",
        "The job has successfully completed",
    ]
    steps = [message for message in messages if message.startswith("Step ")]
    assert len(steps) == checkpoints[0].step_number

    url = f"{api.base_url}/v1/models/{job.fine_tuned_model}/files"
    listed = httpx2.get(url, headers=api.headers).json()["data"]
    folder = tmp_path / "download"
    folder.mkdir()
    for entry in listed:
        answer = httpx2.get(f"{url}/{entry['name']}", headers=api.headers)
        assert len(answer.content) == entry["bytes"]
        (folder / entry["name"]).write_bytes(answer.content)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny-llama"
    _assert_peft_loads(context.settings.bases_dir / "tiny-llama", folder)

    root = context.storage.local_root
    assert root is not None
    collect_garbage(context, grace_seconds=0)
    files = [path for path in (root / "projects").rglob("*") if path.is_file()]
    kept = {path.name if path.suffix == ".csv" else path.parent.name for path in files} - {"files"}
    assert kept == {"artifact", f"step-{checkpoints[1].step_number:06d}", "step_metrics.csv"}

    _assert_hidden_from_another_project(api, job.fine_tuned_model)
    client.models.delete(job.fine_tuned_model)
    assert httpx2.get(url, headers=api.headers).status_code == 404


def _assert_hidden_from_another_project(api: Api, model: str) -> None:
    body = {"name": "other", "project": "other"}
    key = httpx2.post(f"{api.base_url}/v1/keys", headers=api.headers, json=body).json()["key"]
    headers = {"Authorization": f"Bearer {key}"}
    chat = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
    for method, path, content in (
        ("GET", f"/v1/models/{model}", None),
        ("DELETE", f"/v1/models/{model}", None),
        ("GET", f"/v1/models/{model}/files", None),
        ("GET", f"/v1/models/{model}/files/adapter_config.json", None),
        ("POST", "/v1/chat/completions", chat),
        ("POST", "/v1/completions", {"model": model, "prompt": "hi"}),
        ("POST", "/v1/responses", {"model": model, "input": "hi"}),
    ):
        answer = httpx2.request(method, api.base_url + path, headers=headers, json=content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found"), path
    assert model not in httpx2.get(f"{api.base_url}/v1/models", headers=headers).text
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


def test_live_events_arrive_in_order_and_end_with_done(
    api: Api, client: openai.OpenAI, context: WorkerContext
) -> None:
    job_id = _create(client, colour_rows(12))
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
    client: openai.OpenAI,
    context: WorkerContext,
    rows: list[dict[str, object]],
    body: dict[str, object],
    reported: str,
) -> None:
    job_id = _create(client, rows, **body)
    work(context)
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert (job.error.code, job.error.param) == ("invalid_training_file", "training_file")
    assert reported.lower() in str(job.error.message).lower(), job.error.message
    assert job.fine_tuned_model is None


def _start_training(context: WorkerContext) -> threading.Thread:
    thread = threading.Thread(target=train_next, args=(context,))
    thread.start()
    return thread


def _wait_for_step(context: WorkerContext, job_id: str, step: int) -> None:
    def reached() -> bool:
        with context.database.transaction() as session:
            return session.get_one(Job, job_id).step >= step

    wait_until(reached, what=f"step {step}")


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


def _prepare_long_job(client: openai.OpenAI, context: WorkerContext, n_epochs: int = 8) -> str:
    job_id = _create(client, colour_rows(40), hyperparameters={"n_epochs": n_epochs, "batch_size": 1})
    prepare(context, job_id)
    # A process of its own, which is found by its command line.
    context.fork_server = None
    return job_id


def _digests(context: WorkerContext) -> list[str]:
    with context.database.transaction() as session:
        return [
            model.artifact_digest for model in session.query(Model).filter_by(kind="tuned").order_by("id")
        ]


def test_a_killed_child_resumes_from_its_save_point_to_the_same_bytes(
    client: openai.OpenAI, context: WorkerContext
) -> None:
    disturbed = _prepare_long_job(client, context, n_epochs=3)
    run = _start_training(context)
    _wait_for_step(context, disturbed, 10)
    pid = _child_pid(disturbed)
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    run.join(timeout=60)
    job = client.fine_tuning.jobs.retrieve(disturbed)
    assert job.status == "queued"
    work(context)
    job = client.fine_tuning.jobs.retrieve(disturbed)
    assert job.status == "succeeded", job.error
    messages = _messages(client, disturbed)
    assert any("ended by signal 9" in message for message in messages)
    assert any(message.startswith("Resuming from the save point at step") for message in messages)
    models = [model.id for model in client.models.list() if model.id == job.fine_tuned_model]
    assert len(models) == 1

    undisturbed = _prepare_long_job(client, context, n_epochs=3)
    work(context)
    assert client.fine_tuning.jobs.retrieve(undisturbed).status == "succeeded"
    first, second = _digests(context)
    assert first == second


def test_a_stopping_worker_gives_the_job_back_at_a_save_point(
    client: openai.OpenAI, context: WorkerContext
) -> None:
    job_id = _prepare_long_job(client, context)
    run = _start_training(context)
    _wait_for_step(context, job_id, 5)
    context.stopping.set()
    run.join(timeout=30)
    with context.database.transaction() as session:
        job = session.get_one(Job, job_id)
        assert (job.status, job.lease_owner, job.num_crashes) == ("queued", None, 0)
        assert job.save_points
        outcomes = [
            a.outcome for a in session.query(Attempt).filter_by(job_id=job_id).order_by("lease_epoch")
        ]
    assert outcomes == ["prepared", "given_back"]
    assert _child_pid(job_id) is None


def test_cancel_ends_the_child_and_publishes_nothing(client: openai.OpenAI, context: WorkerContext) -> None:
    job_id = _prepare_long_job(client, context)
    run = _start_training(context)
    _wait_for_step(context, job_id, 5)
    assert client.fine_tuning.jobs.cancel(job_id).status == "cancelled"
    run.join(timeout=5)
    assert not run.is_alive(), "the attempt continues after its job was cancelled"
    assert _child_pid(job_id) is None
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert (job.status, job.fine_tuned_model) == ("cancelled", None)


def test_a_job_that_crashes_every_time_fails_after_its_last_attempt(
    client: openai.OpenAI, context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = _prepare_long_job(client, context)
    monkeypatch.setattr("sys.executable", "/bin/false")
    # The job's processes die, and the machine is well.
    monkeypatch.setattr("worker.quarantine.test_machine", lambda _: None)
    for _ in range(3):
        wait_until(lambda: train_next(context), what="the next attempt's time has come")
    assert not train_next(context)
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error.code == "worker_crashed"
    assert "attempt 3 of 3" in str(job.error.message)


def test_a_worker_that_lost_its_lease_writes_nothing(client: openai.OpenAI, context: WorkerContext) -> None:
    job_id = _prepare_long_job(client, context)
    with context.database.transaction() as session:
        taken = leases.claim_for_training(session, context.worker_id, 1, 0.001)
    assert taken is not None
    zombie, _ = taken
    with context.database.transaction() as session:
        session.execute(text("SELECT pg_sleep(0.05)"))
    with context.database.transaction() as session:
        assert leases.sweep(session) == [job_id]
    other = make_context(context.settings)
    sweep(other)
    with other.database.transaction() as session:
        assert leases.claim_for_training(session, other.worker_id, 1, 30) is not None
    for write in (
        lambda session: leases.renew(session, zombie, 30),
        lambda session: leases.update_job(session, zombie, step=99),
        lambda session: leases.retry_or_fail(session, zombie, WorkerCrashedError("x"), max_attempts=3),
        lambda session: leases.leave(session, zombie, leases.JobStatus.SUCCEEDED, outcome="x"),
    ):
        with pytest.raises(LeaseLostError), context.database.transaction() as session:
            write(session)
    with other.database.transaction() as session:
        job = session.get_one(Job, job_id)
        assert (job.status, job.step, job.lease_owner) == ("running", 0, other.worker_id)
    other.database.close()


def test_one_slot_holds_one_job_and_event_numbers_have_no_gap(
    client: openai.OpenAI, context: WorkerContext
) -> None:
    jobs = [_prepare_long_job(client, context) for _ in range(2)]
    with context.database.transaction() as session:
        first = leases.claim_for_training(session, context.worker_id, 1, 30)
    with context.database.transaction() as session:
        assert leases.claim_for_training(session, context.worker_id, 1, 30) is None
    assert first is not None
    assert first[0].job_id == jobs[0]
    with context.database.transaction() as session:
        for job_id in jobs:
            numbers = [e.seq for e in session.query(JobEvent).filter_by(job_id=job_id).order_by("seq")]
            assert numbers == list(range(1, len(numbers) + 1))


def test_the_database_refuses_an_illegal_change_of_status(
    client: openai.OpenAI, context: WorkerContext
) -> None:
    job_id = _create(client, colour_rows(12))
    client.fine_tuning.jobs.cancel(job_id)
    refused = pytest.raises(IntegrityError, match="can not go from cancelled to running")
    with refused, context.database.transaction() as session:
        session.execute(text("UPDATE jobs SET status = 'running' WHERE id = :id"), {"id": job_id})
