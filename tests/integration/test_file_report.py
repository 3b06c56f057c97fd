"""A file's report over HTTP, and files of every container and format on their way into a job."""

import csv
import gzip
import io
import json
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from api import file_report
from luthier.core.errors import UnavailableError
from luthier.core.settings import Settings
from luthier.data.reports.file_report import DataReport
from luthier.data.reports.process import report_in_process
from tests.conftest import Api, wait_until
from tests.rows import chat_row, colour_rows, jsonl, preference_row
from worker.context import WorkerContext
from worker.tasks.prepare import prepare


def _report(api: Api, file_id: str, **query: str) -> httpx2.Response:
    return api.ask("GET", f"/files/{file_id}/report", params={"base": "tiny-llama"} | query)


def _check_refused(answer: httpx2.Response, status: int, code: str, param: str) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (status, code, param), answer.text


def test_a_report_says_what_a_job_would_find(api: Api) -> None:
    rows = [*colour_rows(20), *colour_rows(2), chat_row("q", "a", weight=0)]
    file_id, validation_id = api.upload_file(jsonl(rows)), api.upload_file(jsonl(colour_rows(3)))
    answer = _report(api, file_id, validation_file=validation_id)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert (found["object"], found["file_id"], found["base"]) == ("file.report", file_id, "tiny-llama")
    assert (found["format"], found["rows"], found["num_faults"]) == ("chat", 23, 1)
    assert (found["faults"][0]["line"], found["faults"][0]["rule"]) == (23, "row.nothing_supervised")
    assert found["duplicates"]["exact"] == {
        "rows": 2,
        "pairs": [{"line": 21, "other": 1}, {"line": 22, "other": 2}],
    }
    assert found["overlap"]["exact"]["rows"] == 5
    assert 0 < found["tokens"]["supervised_share"] < 1
    shown = found["shown"][0]
    learnt = "".join(shown["text"][start:end] for start, end in shown["supervised"])
    assert learnt == '{"colour": "red", "number": 0}<|im_end|>'
    schema = api.http.get("/openapi.json").json()["paths"]["/v1/files/{file_id}/report"]
    assert "FileReportObject" in json.dumps(schema["get"]["responses"]["200"])


def test_what_can_not_be_reported_on_is_said(api: Api, settings: Settings) -> None:
    file_id = api.upload_file(jsonl(colour_rows()))
    # The preloaded base of these settings is in no catalogue here.
    for base in ("nope", ""):
        _check_refused(_report(api, file_id, base=base), 400, "model_not_available", "base")
    with_unknown = _report(api, file_id, validation_file="file-nope")
    _check_refused(with_unknown, 400, "invalid_value", "validation_file")
    _check_refused(_report(api, "file-nope"), 404, "not_found", "id")
    folder = settings.bases_dir / "tiny-llama"
    folder.rename(settings.bases_dir / "away")
    try:
        _check_refused(_report(api, file_id), 400, "model_not_available", "base")
    finally:
        (settings.bases_dir / "away").rename(folder)


def test_a_report_reads_stored_bytes_where_they_are_and_misses_them_by_name(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = api.state.storage.local_root
    before = {path for path in root.rglob("*") if path.is_file()}
    file_id = api.upload_file(jsonl(colour_rows()))
    [stored] = {path for path in root.rglob("*") if path.is_file()} - before
    other_id = api.upload_file(jsonl(colour_rows(3)))
    read: list[Path] = []

    def watched(path: Path, *given: Any, **options: Any) -> DataReport:
        read.append(path)
        return report_in_process(path, *given, **options)

    monkeypatch.setattr(file_report, "report_in_process", watched)
    assert _report(api, file_id).status_code == 200
    assert read == [stored]
    stored.unlink()
    for answer, status, code, param in (
        (_report(api, file_id), 404, "not_found", "id"),
        (_report(api, other_id, validation_file=file_id), 400, "invalid_value", "validation_file"),
    ):
        _check_refused(answer, status, code, param)
        assert file_id in answer.text


def test_a_report_is_stopped_when_its_client_disconnects(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    file_id = api.upload_file(jsonl(colour_rows()))
    begun, given_up = threading.Event(), threading.Event()

    def slow(*_paths: object, is_given_up: Callable[[], bool], **_options: object) -> NoReturn:
        begun.set()
        wait_until(is_given_up, what="the report is stopped")
        given_up.set()
        raise UnavailableError("stopped")

    monkeypatch.setattr(file_report, "report_in_process", slow)
    url = httpx2.URL(api.base_url)
    with socket.create_connection((url.host, url.port)) as connection:
        asked = f"GET /v1/files/{file_id}/report?base=tiny-llama HTTP/1.1\r\nHost: {url.host}\r\n"
        connection.sendall(f"{asked}Authorization: Bearer {api.key}\r\n\r\n".encode())
        wait_until(begun.is_set, what="the report is begun")
        refused = _report(api, file_id)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert "has 1 reports on files being made" in refused.text
    wait_until(given_up.is_set, what="the report is given up")
    monkeypatch.undo()
    wait_until(lambda: _report(api, file_id).status_code == 200, what="another report is made")


def test_a_report_on_a_file_that_takes_too_long_is_one_of_its_first_rows(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_id = api.upload_file(jsonl(colour_rows(700)))
    whole = _report(api, file_id).json()
    monkeypatch.setattr(file_report, "_MAX_SECONDS", 0.0)
    sample = _report(api, file_id).json()
    assert (whole["is_sample"], whole["rows"]) == (False, 700)
    assert (sample["is_sample"], sample["rows"]) == (True, 256)


def _as_csv(rows: list[dict[str, str]]) -> bytes:
    target = io.StringIO(newline="")
    writer = csv.DictWriter(target, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return target.getvalue().encode()


def _as_parquet(rows: list[dict[str, Any]]) -> bytes:
    target = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), target)
    return target.getvalue()


_PAIRS = [{"prompt": f"the number {number} is", "completion": f" {number * 7}"} for number in range(12)]
_FILES = {
    "chat in an array": json.dumps(colour_rows(), indent=1).encode(),
    "chat in gzip": gzip.compress(jsonl(colour_rows())),
    "chat in Parquet": _as_parquet(colour_rows()),
    "completion in CSV": _as_csv(_PAIRS),
    "instruction": jsonl([{"instruction": one["prompt"], "output": one["completion"]} for one in _PAIRS]),
    "text": jsonl([{"text": one["prompt"]} for one in _PAIRS]),
    "labels in CSV": _as_csv([{"text": one["prompt"], "label": str(n % 2)} for n, one in enumerate(_PAIRS)]),
    "sharegpt": jsonl(
        [
            {"conversations": [{"from": "human", "value": one["prompt"]}, {"from": "gpt", "value": "yes"}]}
            for one in _PAIRS
        ]
    ),
}


def test_files_of_every_container_and_format_become_queued_jobs(api: Api, context: WorkerContext) -> None:
    for name, content in _FILES.items():
        job_id = api.create_job(api.upload_file(content))["id"]
        prepare(context, job_id)
        job = api.ok("GET", f"/fine_tuning/jobs/{job_id}")
        assert job["status"] == "queued", (name, job["error"])


def test_preferences_are_checked_at_upload(api: Api) -> None:
    preferences = [preference_row(one["prompt"], "yes", "no") for one in _PAIRS]
    api.upload_file(jsonl(preferences))
    preferences[3]["preferred_output"][0]["content"] = None
    message = api.upload(jsonl(preferences)).json()["error"]["message"]
    assert message.startswith("Line 4, preferred_output[0].content:")


def test_a_broken_parquet_file_leaves_nothing_behind(api: Api) -> None:
    answer = api.upload(_as_parquet([*_PAIRS, {"prompt": "p", "completion": ""}]))
    _check_refused(answer, 400, "invalid_file_format", "file")
    assert answer.json()["error"]["message"].startswith("Row 13, completion:")
    assert api.stored_objects() == []
