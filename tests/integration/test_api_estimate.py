"""An estimate over HTTP: what a create checks, the same numbers as prepare's, and nothing stored."""

import gzip
import os
import tempfile
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from sqlalchemy import delete, func, select

from api import job_estimate
from db.session import Database
from db.tables import Base, File, IdempotencyKey, Job, JobEvent
from luthier.client import LuthierClient
from luthier.core.cost_model import DeviceSpeed
from luthier.core.settings import Settings
from services.capacity import workers
from tests.conftest import Api
from tests.rows import chat_row, colour_rows, jsonl
from tests.training import fork_server, train_next
from worker.app import sweep
from worker.context import WorkerContext, make_context
from worker.speed import measure_once
from worker.tasks.prepare import prepare


def _upload(api: Api, rows: list[dict[str, Any]], key: str | None = None) -> str:
    answer = httpx2.post(
        f"{api.base_url}/v1/files",
        headers={"Authorization": f"Bearer {key or api.key}"},
        data={"purpose": "fine-tune"},
        files={"file": ("rows.jsonl", jsonl(rows))},
    )
    return str(answer.json()["id"])


@pytest.fixture
def file_id(api: Api) -> str:
    return _upload(api, colour_rows(24))


def _post(api: Api, path: str, body: dict[str, Any]) -> httpx2.Response:
    url = f"{api.base_url}/v1/fine_tuning/jobs{path}"
    return httpx2.post(url, headers=api.headers, json=body, timeout=60)


def _estimate(api: Api, file_id: str, **body: Any) -> dict[str, Any]:
    answer = _post(api, "/estimate", {"model": "tiny-llama", "training_file": file_id, **body})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_an_estimate_says_what_prepare_will_find(api: Api, settings: Settings, file_id: str) -> None:
    body = {
        "tuning": {"type": "prefix"},
        "training": {"validation_split": 0.25},
        "hyperparameters": {"n_epochs": 3},
    }
    found = _estimate(api, file_id, **body)
    job = _post(api, "", {"model": "tiny-llama", "training_file": file_id, **body}).json()
    context = make_context(settings)
    prepare(context, job["id"])
    url = f"{api.base_url}/v1/fine_tuning/jobs/{job['id']}"
    prepared = httpx2.get(url, headers=api.headers).json()
    assert prepared["status"] == "queued"
    for member in ("hyperparameters", "tuning", "training"):
        assert found[member] == prepared[member], member
    report = httpx2.get(f"{url}/report", headers=api.headers).json()["prepare"]["training"]
    whole = _estimate(api, file_id)
    assert whole["tokens"] == report["num_tokens"]
    assert whole["supervised_tokens"] == report["num_supervised_tokens"]
    assert (found["rows"]["train"], found["rows"]["validation"]) == (18, 6)
    # 18 rows in batches of 4, three times.
    assert (found["steps"], found["trained_tokens"]) == (15, 3 * found["tokens"])
    assert found["rows"]["is_sampled"] is False


def test_nothing_is_stored_and_nothing_is_notified(api: Api, database: Database, file_id: str) -> None:
    with LuthierClient(f"{api.base_url}/v1", api.key) as client:
        found = client.estimate_job({"model": "gpt-4o-mini-2024-07-18", "training_file": file_id})
    assert (found["object"], found["model"]) == ("fine_tuning.job.estimate", "tiny-llama")
    assert api.notified == []
    with database.transaction() as session:
        for table in (Job, JobEvent, IdempotencyKey):
            assert session.scalar(select(func.count()).select_from(table)) == 0, table
        assert session.scalar(select(func.count()).select_from(File)) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"model": "nope"},
        {"model": None},
        {"colour": 1},
        {"training_file": "file-nope"},
        {"validation_file": "file-nope"},
        {"hyperparameters": {"n_epochs": 0}},
        {"tuning": {"type": "lora", "rnak": 8}},
        {"tuning": {"type": "sorcery"}},
        {"tuning": {"quantization": "nf4"}},
        {"training": {"patience": 3}},
        {"training": {"patients": 3}},
        {"method": {"type": "reinforcement"}},
        {"integrations": [{"type": "wandb"}]},
    ],
)
def test_what_a_create_refuses_an_estimate_refuses_in_the_same_words(
    api: Api, file_id: str, change: dict[str, Any]
) -> None:
    body = {"model": "tiny-llama", "training_file": file_id} | change
    created, estimated = _post(api, "", body), _post(api, "/estimate", body)
    assert created.status_code == 400
    assert (estimated.status_code, estimated.json()) == (created.status_code, created.json())


def test_files_of_others_are_not_there_and_a_key_is_needed(api: Api) -> None:
    with LuthierClient(f"{api.base_url}/v1", api.key) as client:
        other = client.create_key("other", project="other")["key"]
    foreign = _upload(api, colour_rows(24), key=other)
    body = {"model": "tiny-llama", "training_file": foreign}
    assert _post(api, "/estimate", body).json()["error"]["param"] == "training_file"
    assert httpx2.post(f"{api.base_url}/v1/fine_tuning/jobs/estimate", json=body).status_code == 401


def test_parameters_that_only_the_base_refuses_are_refused_by_create_too(api: Api, file_id: str) -> None:
    body = {"model": "tiny-llama", "training_file": file_id}
    for tuning, param in (
        ({"rank": 200}, "tuning.rank"),
        ({"target_modules": ["sky"]}, "tuning.target_modules"),
        ({"type": "adapter", "bottleneck_dim": 8192}, "tuning.bottleneck_dim"),
        ({"type": "full", "freeze": ["sky"]}, "tuning.freeze"),
    ):
        for path in ("/estimate", ""):
            answer = _post(api, path, body | {"tuning": tuning})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


def test_a_base_that_no_machine_has_fetched_makes_no_job(
    api: Api, file_id: str, tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.state.settings, "bases_dir", tmp_path / "empty")
    with database.transaction() as session:
        session.execute(delete(Base))
    body = {"model": "tiny-llama", "training_file": file_id}
    error = _post(api, "", body).json()["error"]
    assert (error["code"], error["param"]) == ("model_not_available", "model")
    assert "luthier bases fetch tiny-llama" in error["message"]

    def announce(digest: str | None) -> int:
        with database.transaction() as session:
            facts = {"bases": {"tiny-llama": digest}}
            workers.beat(session, "w", hostname="h", num_slots=1, facts=facts)
        return _post(api, "", body).status_code

    assert (announce(None), announce("sha256:0")) == (400, 200)
    assert announce(None) == 400
    monkeypatch.setattr(api.state.settings, "fetch_on_demand", True)
    assert _post(api, "", body).status_code == 200


@pytest.mark.parametrize(("too_long", "num_left"), [("error", 20), ("drop", 20), ("truncate", 24)])
def test_rows_over_the_length_are_counted_and_reported(api: Api, too_long: str, num_left: int) -> None:
    rows = colour_rows(20) + [chat_row("what?", "the sky is blue and the sea is too. " * 40)] * 4
    found = _estimate(api, _upload(api, rows), training={"max_length": 96, "too_long": too_long})
    assert (found["rows"]["too_long"], found["rows"]["train"], found["rows"]["total"]) == (4, num_left, 24)
    assert any("more than 96 tokens" in warning for warning in found["warnings"])


def test_a_limit_beyond_the_bases_room_is_reported(api: Api, file_id: str) -> None:
    found = _estimate(api, file_id, training={"max_length": 5000})
    assert found["training"]["max_length"] == 256
    (warning,) = found["warnings"]
    assert warning.startswith("training.max_length is 256, not 5000:")


def test_a_large_file_is_reported_by_an_even_sample(
    api: Api, file_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _estimate(api, file_id)
    monkeypatch.setattr(job_estimate, "MAX_ROWS", 12)
    found = _estimate(api, file_id)
    assert found["rows"]["is_sampled"] is True
    assert (found["rows"]["counted"], found["rows"]["total"], found["rows"]["train"]) == (12, 24, 24)
    assert found["tokens"] == pytest.approx(whole["tokens"], rel=0.05)
    assert found["steps"] == whole["steps"]


def test_a_base_that_the_api_does_not_have_is_said_so(api: Api, settings: Settings, file_id: str) -> None:
    folder = settings.bases_dir / "tiny-llama"
    folder.rename(settings.bases_dir / "away")
    try:
        answer = _post(api, "/estimate", {"model": "tiny-llama", "training_file": file_id})
    finally:
        (settings.bases_dir / "away").rename(folder)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "model_not_available", "model")
    assert "luthier bases fetch tiny-llama" in error["message"]


def test_a_large_file_is_neither_copied_nor_kept_in_memory(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 10 MB of rows, plain and packed, an estimate holds a few at a time and writes no temporary file."""
    plain = jsonl([chat_row(os.urandom(32).hex(), "blue") for _ in range(60_000)])
    monkeypatch.setattr(job_estimate, "MAX_ROWS", 200)
    for content in (plain, gzip.compress(plain)):
        monkeypatch.setattr(tempfile, "tempdir", None)
        made = httpx2.post(
            f"{api.base_url}/v1/files",
            headers=api.headers,
            data={"purpose": "fine-tune"},
            files={"file": ("rows.jsonl", content)},
            timeout=120,
        ).json()
        # Where there is no such folder nothing temporary can be written.
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
        tracemalloc.start()
        try:
            found = _estimate(api, made["id"])
            _, peak_bytes = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak_bytes < 8 * 1024**2
        assert (found["rows"]["total"], found["rows"]["counted"]) == (60_000, 200)
        assert any("first 200 rows" in warning for warning in found["warnings"]) == (content is not plain)


def test_a_project_has_one_estimate_at_a_time(
    api: Api, file_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, may_end = threading.Event(), threading.Event()
    count = job_estimate.count_rows

    def slow(*args: Any, **options: Any) -> Any:
        began.set()
        may_end.wait(30)
        return count(*args, **options)

    monkeypatch.setattr(job_estimate, "count_rows", slow)
    body = {"model": "tiny-llama", "training_file": file_id}
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(_post, api, "/estimate", body)
        assert began.wait(30)
        second = _post(api, "/estimate", body)
        may_end.set()
        assert first.result().status_code == 200
    assert (second.status_code, second.headers["retry-after"]) == (429, "1")
    assert "estimates being made, and the limit is 1 at a time" in second.json()["error"]["message"]
    assert _post(api, "/estimate", body).status_code == 200


def test_a_speed_is_measured_once_for_a_machine_and_each_setting_of_its_device(
    api: Api, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []

    def measure(context: WorkerContext) -> DeviceSpeed:
        measured.append(context.settings.device)
        return DeviceSpeed(
            device="cpu", num_threads=context.num_threads, precision="float32", product_flops={"float32": 1e9}
        )

    monkeypatch.setattr("worker.speed._measure", measure)
    for device in ("cpu", "auto", "cpu", "auto"):
        context = make_context(settings.model_copy(update={"device": device}))
        measure_once(context)
        sweep(context)
    assert measured == ["cpu", "auto"]


# With virtual tokens, which a run does not count among its own.
@pytest.mark.parametrize("tuning", [{"type": "lora"}, {"type": "prompt"}], ids=lambda tuning: tuning["type"])
def test_seconds_come_from_the_device_and_then_from_finished_jobs(
    api: Api, settings: Settings, file_id: str, tuning: dict[str, str]
) -> None:
    """Without any measurement there are none, and no worker has to load a base to give them."""
    unknown = _estimate(api, file_id, tuning=tuning)
    assert (unknown["seconds"], unknown["peak_memory_bytes"], unknown["basis"]) == (None, None, None)
    assert "No worker has measured" in unknown["reason"]
    context = make_context(settings)
    context.fork_server = fork_server()
    measure_once(context)
    sweep(context)
    measured = _estimate(api, file_id, tuning=tuning)
    assert measured["basis"]["finished_jobs"] == 0
    assert measured["seconds"]["total"] > 0
    assert measured["peak_memory_bytes"] > 0
    job = _post(api, "", {"model": "tiny-llama", "training_file": file_id, "tuning": tuning}).json()
    prepare(context, job["id"])
    assert train_next(context)
    url = f"{api.base_url}/v1/fine_tuning/jobs/{job['id']}"
    run = httpx2.get(f"{url}/report", headers=api.headers).json()["run"]
    after = _estimate(api, file_id, tuning=tuning)
    assert after["basis"]["finished_jobs"] == 1
    # The same job again takes what the first one took.
    for phase in ("load", "train", "evaluate", "save"):
        assert after["seconds"][phase] == pytest.approx(run["seconds"][phase], rel=0.2, abs=0.02), phase
