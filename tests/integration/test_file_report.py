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
from tests.integration.wire import upload
from tests.rows import chat_row, colour_rows, jsonl
from worker.context import WorkerContext
from worker.tasks.prepare import prepare


def _report(api: Api, file_id: str, **query: str) -> httpx2.Response:
    url = f"{api.base_url}/v1/files/{file_id}/report"
    return httpx2.get(url, headers=api.headers, params={"base": "tiny-llama"} | query, timeout=60)


def test_a_report_says_what_a_job_would_find(api: Api) -> None:
    rows = [*colour_rows(20), *colour_rows(2), chat_row("q", "a", weight=0)]
    file_id = upload(api, jsonl(rows)).json()["id"]
    validation_id = upload(api, jsonl(colour_rows(3))).json()["id"]
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
    schema = httpx2.get(f"{api.base_url}/openapi.json").json()["paths"]["/v1/files/{file_id}/report"]
    assert "FileReportObject" in json.dumps(schema["get"]["responses"]["200"])


def test_what_can_not_be_reported_on_is_said(api: Api, settings: Settings) -> None:
    file_id = upload(api, jsonl(colour_rows())).json()["id"]
    cases = [
        (_report(api, file_id, base="nope"), 400, "model_not_available", "base"),
        # The preloaded base of these settings is in no catalogue here.
        (_report(api, file_id, base=""), 400, "model_not_available", "base"),
        (_report(api, file_id, validation_file="file-nope"), 400, "invalid_value", "validation_file"),
        (_report(api, "file-nope"), 404, "not_found", "id"),
    ]
    folder = settings.bases_dir / "tiny-llama"
    folder.rename(settings.bases_dir / "away")
    try:
        cases.append((_report(api, file_id), 400, "model_not_available", "base"))
    finally:
        (settings.bases_dir / "away").rename(folder)
    for answer, status, code, param in cases:
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (status, code, param), answer.text
    assert httpx2.get(f"{api.base_url}/v1/files/{file_id}/report").status_code == 401


def test_a_report_reads_stored_bytes_where_they_are_and_misses_them_by_name(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = api.state.storage.local_root
    assert root is not None
    before = {path for path in root.rglob("*") if path.is_file()}
    file_id = upload(api, jsonl(colour_rows())).json()["id"]
    [stored] = {path for path in root.rglob("*") if path.is_file()} - before
    other_id = upload(api, jsonl(colour_rows(3))).json()["id"]
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
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (status, code, param), answer.text
        assert file_id in error["message"]


def test_a_report_is_stopped_when_its_client_disconnects(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    file_id = upload(api, jsonl(colour_rows())).json()["id"]
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
    file_id = upload(api, jsonl(colour_rows(700))).json()["id"]
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
_PREFERENCES = [
    {
        "input": {"messages": [{"role": "user", "content": one["prompt"]}]},
        "preferred_output": [{"role": "assistant", "content": "yes"}],
        "non_preferred_output": [{"role": "assistant", "content": "no"}],
    }
    for one in _PAIRS
]


def _prepared(api: Api, context: WorkerContext, content: bytes) -> dict[str, Any]:
    uploaded = upload(api, content, "rows.bin")
    assert uploaded.status_code == 200, uploaded.text
    url = f"{api.base_url}/v1/fine_tuning/jobs"
    asked = {"model": "tiny-llama", "training_file": uploaded.json()["id"]}
    job_id = httpx2.post(url, headers=api.headers, json=asked).json()["id"]
    prepare(context, job_id)
    found: dict[str, Any] = httpx2.get(f"{url}/{job_id}", headers=api.headers).json()
    return found


def test_files_of_every_container_and_format_become_queued_jobs(api: Api, context: WorkerContext) -> None:
    for name, content in _FILES.items():
        job = _prepared(api, context, content)
        assert job["status"] == "queued", (name, job["error"])


def test_preferences_are_checked_atupload(api: Api) -> None:
    assert upload(api, jsonl(_PREFERENCES)).status_code == 200
    broken = json.loads(json.dumps(_PREFERENCES))
    broken[3]["preferred_output"][0]["content"] = None
    error = upload(api, jsonl(broken)).json()["error"]
    assert error["message"].startswith("Line 4, preferred_output[0].content:")


def test_a_broken_parquet_file_leaves_nothing_behind(api: Api) -> None:
    answer = upload(api, _as_parquet([*_PAIRS, {"prompt": "p", "completion": ""}]))
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_file_format")
    assert answer.json()["error"]["message"].startswith("Row 13, completion:")
    root = api.state.storage.local_root
    assert root is not None
    assert [path for path in root.rglob("*") if path.is_file()] == []
