"""An estimate over HTTP: what a create checks, the same numbers as prepare's, and nothing stored."""

import gzip
import os
import tempfile
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import delete, func, select

from api import job_estimate
from db.session import Database
from db.tables import Base, File, IdempotencyKey, Job, JobEvent
from luthier.client import LuthierClient
from luthier.core.cost_model import DeviceSpeed
from luthier.core.settings import Settings
from services.capacity import workers
from tests.conftest import TINY_BASE, Api
from tests.rows import chat_row, colour_rows, jsonl
from tests.training import fork_server, train_next
from worker.app import sweep
from worker.context import WorkerContext, make_context
from worker.speed import measure_once
from worker.tasks.prepare import prepare

_PATH = "/fine_tuning/jobs/estimate"


@pytest.fixture
def file_id(api: Api) -> str:
    return api.upload_file(jsonl(colour_rows(24)))


def _estimate(api: Api, file_id: str, **body: Any) -> dict[str, Any]:
    return api.ok("POST", _PATH, {"model": TINY_BASE, "training_file": file_id, **body}, timeout=60)


def test_an_estimate_says_what_prepare_will_find(api: Api, settings: Settings, file_id: str) -> None:
    body = {"tuning": {"type": "prefix"}, "training": {"validation_split": 0.25}}
    body["hyperparameters"] = {"n_epochs": 3}
    found = _estimate(api, file_id, **body)
    job_id = api.create_job(file_id, **body)["id"]
    prepare(make_context(settings), job_id)
    prepared = api.ok("GET", f"/fine_tuning/jobs/{job_id}")
    assert prepared["status"] == "queued"
    for member in ("hyperparameters", "tuning", "training"):
        assert found[member] == prepared[member], member
    report = api.ok("GET", f"/fine_tuning/jobs/{job_id}/report")["prepare"]["training"]
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


def test_parameters_that_only_the_base_refuses_are_refused_by_create_too(api: Api, file_id: str) -> None:
    body = {"model": "tiny-llama", "training_file": file_id}
    for tuning, param in (
        ({"rank": 200}, "tuning.rank"),
        ({"target_modules": ["sky"]}, "tuning.target_modules"),
        ({"type": "adapter", "bottleneck_dim": 8192}, "tuning.bottleneck_dim"),
        ({"type": "full", "freeze": ["sky"]}, "tuning.freeze"),
    ):
        for path in ("/estimate", ""):
            refused = api.refused("POST", f"/fine_tuning/jobs{path}", body | {"tuning": tuning})
            assert (refused[0], refused[2]) == (400, param), refused


def test_a_base_that_no_machine_has_fetched_makes_no_job(
    api: Api, file_id: str, tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.state.settings, "bases_dir", tmp_path / "empty")
    with database.transaction() as session:
        session.execute(delete(Base))
    body = {"model": "tiny-llama", "training_file": file_id}
    _, code, param, message = api.refused("POST", "/fine_tuning/jobs", body)
    assert (code, param) == ("model_not_available", "model")
    assert "luthier bases fetch tiny-llama" in message

    def announce(digest: str | None) -> int:
        with database.transaction() as session:
            facts = {"bases": {"tiny-llama": digest}}
            workers.beat(session, "w", hostname="h", num_slots=1, facts=facts)
        return api.ask("POST", "/fine_tuning/jobs", body).status_code

    assert (announce(None), announce("sha256:0")) == (400, 200)
    assert announce(None) == 400
    monkeypatch.setattr(api.state.settings, "fetch_on_demand", True)
    assert api.create_job(file_id)


@pytest.mark.parametrize(("too_long", "num_left"), [("error", 20), ("drop", 20), ("truncate", 24)])
def test_rows_over_the_length_are_counted_and_reported(api: Api, too_long: str, num_left: int) -> None:
    rows = colour_rows(20) + [chat_row("what?", "the sky is blue and the sea is too. " * 40)] * 4
    found = _estimate(api, api.upload_file(jsonl(rows)), training={"max_length": 96, "too_long": too_long})
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
        refused = api.refused("POST", _PATH, {"model": TINY_BASE, "training_file": file_id})
    finally:
        (settings.bases_dir / "away").rename(folder)
    assert refused[:3] == (400, "model_not_available", "model")
    assert "luthier bases fetch tiny-llama" in refused[3]


def test_a_large_file_is_neither_copied_nor_kept_in_memory(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 10 MB of rows, plain and packed, an estimate holds a few at a time and writes no temporary file."""
    plain = jsonl([chat_row(os.urandom(32).hex(), "blue") for _ in range(60_000)])
    monkeypatch.setattr(job_estimate, "MAX_ROWS", 200)
    for content in (plain, gzip.compress(plain)):
        monkeypatch.setattr(tempfile, "tempdir", None)
        file_id = api.upload_file(content)
        # Where there is no such folder nothing temporary can be written.
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
        tracemalloc.start()
        try:
            found = _estimate(api, file_id)
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
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(_estimate, api, file_id)
        assert began.wait(30)
        second = api.ask("POST", _PATH, {"model": TINY_BASE, "training_file": file_id})
        may_end.set()
        assert first.result()
    assert (second.status_code, second.headers["retry-after"]) == (429, "1")
    assert "estimates being made, and the limit is 1 at a time" in second.json()["error"]["message"]
    assert _estimate(api, file_id)


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
    job_id = api.create_job(file_id, tuning=tuning)["id"]
    prepare(context, job_id)
    assert train_next(context)
    run = api.ok("GET", f"/fine_tuning/jobs/{job_id}/report")["run"]
    after = _estimate(api, file_id, tuning=tuning)
    assert after["basis"]["finished_jobs"] == 1
    # The same job again takes what the first one took.
    for phase in ("load", "train", "evaluate", "save"):
        assert after["seconds"][phase] == pytest.approx(run["seconds"][phase], rel=0.2, abs=0.02), phase
