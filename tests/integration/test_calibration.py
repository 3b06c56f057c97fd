"""A worker measures its bases while it has no job, and estimates rest on what it found."""

import threading
from typing import Any

import httpx2
import pytest
from sqlalchemy import select, update

from db.session import Database
from db.tables import Calibration as CalibrationRow
from db.tables import Job
from luthier.core.estimates import Calibration
from luthier.core.settings import Settings
from luthier.methods import discover
from tests.conftest import Api, wait_until
from tests.rows import colour_rows, jsonl, preference_row
from worker import calibration
from worker.app import sweep
from worker.calibration import calibrate_when_idle
from worker.context import WorkerContext, make_context


@pytest.fixture
def context(settings: Settings, api: Api) -> WorkerContext:
    made = make_context(settings)
    sweep(made)
    return made


def _upload(api: Api, rows: list[dict[str, Any]]) -> str:
    url = f"{api.base_url}/v1/files"
    files = {"file": ("rows.jsonl", jsonl(rows))}
    return httpx2.post(url, headers=api.headers, data={"purpose": "fine-tune"}, files=files).json()["id"]


def _estimate(api: Api, **body: Any) -> dict[str, Any]:
    answer = httpx2.post(
        f"{api.base_url}/v1/fine_tuning/jobs/estimate",
        headers=api.headers,
        json={"model": "tiny-llama", "training_file": _upload(api, colour_rows(24)), **body},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def _rows(database: Database) -> list[CalibrationRow]:
    with database.transaction() as session:
        return list(session.scalars(select(CalibrationRow).order_by(CalibrationRow.precision)))


def test_an_idle_worker_measures_its_base_and_estimates_have_seconds_and_bytes(
    api: Api, context: WorkerContext, database: Database
) -> None:
    before = _estimate(api)
    assert (before["seconds"], before["peak_memory_bytes"], before["calibration"]) == (None, None, None)
    assert "tiny-llama" in before["reason"]
    while calibrate_when_idle(context):
        pass
    rows = _rows(database)
    assert [row.precision for row in rows] == ["auto", "float32"]
    for row in rows:
        assert row.error is None
        constants = Calibration.model_validate(row.constants)
        assert set(constants.variants) == {name for one in discover().values() for name in one.probes}
        assert not constants.is_cold
    for name in ("lora", "prefix", "prompt", "adapter", "full"):
        after = _estimate(api, tuning={"type": name}, training={"precision": "float32"})
        seconds = after["seconds"]
        phases = [seconds[phase] for phase in ("load", "train", "evaluate", "save")]
        assert all(spent > 0 for spent in phases), (name, seconds)
        assert seconds["total"] == pytest.approx(sum(phases), abs=0.03)
        assert 100 * 1024**2 < after["peak_memory_bytes"] < 4 * 1024**3
        assert after["calibration"]["worker"] == context.worker_id
        assert after["calibration"]["precision"] == "float32"
        assert after["reason"] is None
    pairs = _upload(api, [preference_row(f"colour of {n}?", f"red {n}", "no idea") for n in range(24)])
    body = {"training_file": pairs, "method": {"type": "dpo"}, "training": {"precision": "float32"}}
    for name in ("lora", "full"):
        assert all(spent > 0 for spent in _estimate(api, tuning={"type": name}, **body)["seconds"].values())


def test_what_is_measured_is_not_measured_again_until_base_or_code_change(
    context: WorkerContext, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    probes: list[str] = []

    def probe(_context: Any, base: Any, precision: str, _measured: Any = ()) -> tuple[None, str]:
        probes.append(precision)
        return None, "out of order"

    monkeypatch.setattr(calibration, "_probe", probe)
    while calibrate_when_idle(context):
        pass
    assert probes == ["auto", "float32"]
    assert [row.error for row in _rows(database)] == ["out of order"] * 2
    with database.transaction() as session:
        session.execute(update(CalibrationRow).values(base_digest="sha256:" + "9" * 64))
    while calibrate_when_idle(context):
        pass
    assert len(probes) == 4
    monkeypatch.setattr(calibration, "code_version", lambda: "newer")
    while calibrate_when_idle(context):
        pass
    assert len(probes) == 6
    assert len(_rows(database)) == 2


def test_a_failed_probe_is_the_reason_that_an_estimate_gives_and_its_words_are_the_operators(
    api: Api, context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_probe", lambda *_: (None, "exit code 1, MemoryError"))
    assert calibrate_when_idle(context)
    found = _estimate(api)
    assert found["seconds"] is None
    assert "probe of a worker failed" in found["reason"]
    assert "MemoryError" not in str(found)
    assert found["steps"] > 0


def test_a_probe_gives_way_to_a_job_at_once_and_is_made_later(
    api: Api, context: WorkerContext, database: Database
) -> None:
    done: list[bool] = []
    thread = threading.Thread(target=lambda: done.append(calibrate_when_idle(context)))
    thread.start()
    body = {"model": "tiny-llama", "training_file": _upload(api, colour_rows(24))}
    httpx2.post(f"{api.base_url}/v1/fine_tuning/jobs", headers=api.headers, json=body)
    thread.join(timeout=30)
    assert done == [False]
    assert _rows(database) == []
    assert not calibrate_when_idle(context)
    with database.transaction() as session:
        session.execute(update(Job).values(status="cancelled"))
    wait_until(lambda: calibrate_when_idle(context), what="it is measured once no job waits")


def test_constants_of_another_version_count_as_none(
    api: Api, context: WorkerContext, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_probe", lambda *_: (None, "out of order"))
    assert calibrate_when_idle(context)
    with database.transaction() as session:
        session.execute(update(CalibrationRow).values(constants={"speed": 3}, error=None))
    found = _estimate(api)
    assert (found["seconds"], found["calibration"]) == (None, None)
    assert "yet" in found["reason"]
