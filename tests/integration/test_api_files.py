"""Files over HTTP: upload, list, retrieve, delete; content with ranges, conditions and names."""

import hashlib
import http.client
import json
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import openai
import pytest

from db.tables import Job, Model
from luthier.core.ids import new_id
from luthier.storage.manifests import seal_folder
from services.files import files
from services.files.files import StoredFile
from tests.conftest import Api
from tests.integration.wire import stored_objects, upload
from tests.rows import colour_rows, jsonl

ROWS = jsonl(colour_rows(40))
SIZE = len(ROWS)
ETAG = f'"{hashlib.sha256(ROWS).hexdigest()}"'


def test_a_file_comes_back_as_it_was_sent(api: Api, client: openai.OpenAI) -> None:
    content = ROWS
    created = client.files.create(file=("rows.jsonl", content), purpose="fine-tune")
    assert (created.object, created.bytes, created.status) == ("file", len(content), "processed")
    assert created.filename == "rows.jsonl"
    assert client.files.retrieve(created.id) == created
    assert client.files.content(created.id).read() == content
    assert [file.id for file in client.files.list(purpose="fine-tune")] == [created.id]


def test_a_deleted_file_is_gone_with_its_bytes(api: Api, client: openai.OpenAI) -> None:
    created = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    assert client.files.delete(created.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(created.id)
    assert stored_objects(api) == []


def test_a_broken_line_is_named_and_nothing_is_kept(api: Api, client: openai.OpenAI) -> None:
    lines = ROWS.splitlines(keepends=True)
    lines[6] = b'{"messages": [}\n'
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("rows.jsonl", b"".join(lines)), purpose="fine-tune")
    assert caught.value.code == "invalid_file_format"
    assert caught.value.param == "file"
    assert "line 7" in str(caught.value).lower()
    assert client.files.list().data == []
    assert stored_objects(api) == []


def test_a_form_is_refused_by_the_field_that_is_wrong(api: Api) -> None:
    url, content = f"{api.base_url}/v1/files", ROWS
    cases: list[tuple[dict[str, str], dict[str, tuple[str, bytes]], str]] = [
        ({}, {"file": ("a.jsonl", content)}, "purpose"),
        ({"purpose": "nonsense"}, {"file": ("a.jsonl", content)}, "purpose"),
        ({"purpose": "fine-tune-results"}, {"file": ("a.jsonl", content)}, "purpose"),
        ({"purpose": "fine-tune", "colour": "red"}, {"file": ("a.jsonl", content)}, "colour"),
        ({"purpose": "fine-tune"}, {"data": ("a.jsonl", content)}, "file"),
        ({"purpose": "fine-tune"}, {"file": ("a.jsonl", b"")}, "file"),
    ]
    for data, sent, param in cases:
        answer = httpx2.post(url, headers=api.headers, data=data, files=sent)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param), error
        assert set(error) == {"message", "type", "param", "code"}
    cut = httpx2.post(
        url,
        headers=api.headers | {"Content-Type": "multipart/form-data; boundary=x"},
        content=b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + content,
    )
    assert cut.status_code == 400
    assert stored_objects(api) == []


def test_an_upload_over_the_limit_is_refused_and_not_kept(api: Api) -> None:
    limit = api.state.settings.max_upload_bytes
    object.__setattr__(
        api.state, "settings", api.state.settings.model_copy(update={"max_upload_bytes": 1000})
    )
    try:
        answer = upload(api, jsonl(colour_rows(100)))
    finally:
        restored = api.state.settings.model_copy(update={"max_upload_bytes": limit})
        object.__setattr__(api.state, "settings", restored)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "file_too_large")
    assert stored_objects(api) == []


def _field(name: str, value: str) -> bytes:
    return f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()


def test_a_cancel_without_a_body_is_no_broken_json(api: Api, client: openai.OpenAI) -> None:
    upload = client.uploads.create(bytes=9, filename="a", mime_type="text/jsonl", purpose="fine-tune")
    headers = api.headers | {"Content-Type": "application/json", "Content-Length": "0"}
    answer = httpx2.post(f"{api.base_url}/v1/uploads/{upload.id}/cancel", headers=headers)
    assert (answer.status_code, answer.json()["status"]) == (200, "cancelled")


def test_fields_of_a_form_come_in_any_order_with_bracketed_names_and_seconds_as_text(api: Api) -> None:
    parts = [
        _field("purpose", "fine-tune"),
        _field("expires_after[anchor]", "created_at"),
        _field("expires_after[seconds]", "86400"),
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n'
        b"Content-Type: text/plain\r\n\r\n" + ROWS + b"\r\n",
    ]
    for start in range(len(parts)):
        body = b"".join([*parts[start:], *parts[:start], b"--x--\r\n"])
        answer = httpx2.post(
            f"{api.base_url}/v1/files",
            headers=api.headers | {"Content-Type": "multipart/form-data; boundary=x"},
            content=body,
        )
        made = answer.json()
        assert answer.status_code == 200, answer.text
        assert (made["bytes"], made["expires_at"]) == (len(ROWS), made["created_at"] + 86400)


def test_a_file_named_upload_of_no_particular_type_is_taken_for_training(client: openai.OpenAI) -> None:
    made = client.files.create(file=ROWS, purpose="fine-tune")
    assert (made.filename, made.purpose) == ("upload", "fine-tune")
    assert client.fine_tuning.jobs.create(model="tiny-llama", training_file=made.id).training_file == made.id


def test_a_file_is_processed_so_that_waiting_for_it_ends(client: openai.OpenAI) -> None:
    made = client.files.create(file=ROWS, purpose="fine-tune")
    assert client.files.wait_for_processing(made.id, poll_interval=60, max_wait_seconds=1) == made


def test_content_is_raw_bytes_whatever_is_accepted(api: Api, client: openai.OpenAI) -> None:
    made = client.files.create(file=ROWS, purpose="fine-tune")
    for accepted in ("application/binary", "application/json", "image/png;q=0.1", "*/*"):
        answer = httpx2.get(
            f"{api.base_url}/v1/files/{made.id}/content", headers=api.headers | {"Accept": accepted}
        )
        assert (answer.status_code, answer.content) == (200, ROWS)
        assert answer.headers["content-length"] == str(len(ROWS))
    assert client.files.content(made.id).read() == ROWS
    with pytest.warns(DeprecationWarning):
        assert client.files.retrieve_content(made.id) == ROWS.decode()


def test_has_more_is_always_there_and_exact(api: Api, client: openai.OpenAI) -> None:
    made = [client.files.create(file=ROWS, purpose="fine-tune").id for _ in range(3)]
    for query, ids, has_more in (
        ("", made[::-1], False),
        ("?limit=3", made[::-1], False),
        ("?limit=2", made[:0:-1], True),
        (f"?limit=2&after={made[1]}", made[:1], False),
        (f"?after={made[0]}", [], False),
        ("?purpose=batch", [], False),
        ("?limit=0", [], True),
        (f"?order=asc&limit=1&after={made[0]}&purpose=fine-tune", made[1:2], True),
    ):
        page = httpx2.get(f"{api.base_url}/v1/files{query}", headers=api.headers).json()
        assert page["object"] == "list"
        assert ([file["id"] for file in page["data"]], page["has_more"]) == (ids, has_more), query
        assert (page["first_id"], page["last_id"]) == ((ids[0], ids[-1]) if ids else (None, None))
    for query, param in (("limit=-1", "limit"), ("limit=10001", "limit"), ("limit=x", "limit"),
                         ("order=newest", "order"), ("after=file-unknown", "after")):  # fmt: skip
        answer = httpx2.get(f"{api.base_url}/v1/files?{query}", headers=api.headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), query


def test_pages_neither_skip_nor_repeat_while_files_come_and_go(api: Api, client: openai.OpenAI) -> None:
    made = [client.files.create(file=ROWS, purpose="fine-tune").id for _ in range(6)]
    with api.state.database.transaction() as session:
        # All of one moment: only the id distinguishes them.
        session.query(files.File).update({"created_at": "2026-01-01T00:00:00Z"})
    first = client.files.list(limit=2)
    assert [file.id for file in first.data] == made[:3:-1]
    client.files.create(file=ROWS, purpose="fine-tune")
    client.files.delete(made[4])
    second = first.get_next_page()
    assert [file.id for file in second.data] == [made[3], made[2]]
    assert [file.id for file in client.files.list(limit=1, order="asc")][:4] == made[:4]


def test_a_result_file_is_found_by_id_and_purpose_and_is_plain_csv(api: Api, client: openai.OpenAI) -> None:
    made = client.files.create(file=ROWS, purpose="fine-tune")
    job_id = client.fine_tuning.jobs.create(model="tiny-llama", training_file=made.id).id
    content = b"step,train_loss\n1,0.5\n"
    stored = StoredFile("file-result", "step_metrics.csv", files.RESULTS_PURPOSE, len(content), 1, "0", "r")
    api.state.storage.put_bytes("r", content)
    with api.state.database.transaction() as session:
        job = session.get_one(Job, job_id)
        job.result_file_id = files.record_result(session, job, stored).id
    [result_id] = client.fine_tuning.jobs.retrieve(job_id).result_files
    assert client.files.retrieve(result_id).purpose == "fine-tune-results"
    assert [file.id for file in client.files.list(purpose="fine-tune-results")] == [result_id]
    assert client.files.content(result_id).text == content.decode()


def test_every_answer_has_a_request_id(api: Api, client: openai.OpenAI) -> None:
    made = client.files.with_raw_response.create(file=ROWS, purpose="fine-tune")
    assert made.headers["x-request-id"].startswith("req_")
    for path in ("/v1/files/file-unknown", "/v1/uploads/upload_unknown", "/v1/uploads/a/b/c"):
        answer = httpx2.get(api.base_url + path, headers=api.headers)
        assert answer.status_code == 404
        assert answer.headers["x-request-id"].startswith("req_")
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def _post_and_continue(api: Api, path: str, body: bytes, key: str) -> int:
    """Return the status of a POST, after another request on the same connection has been answered."""
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "multipart/form-data; boundary=x"}
    connection = http.client.HTTPConnection(urlsplit(api.base_url).netloc, timeout=30)
    connection.connect()
    # A connection that the server closes is not opened again in silence.
    connection.auto_open = False
    try:
        connection.request("POST", path, body=body, headers=headers)
        refusal = connection.getresponse()
        assert json.loads(refusal.read())["error"]["message"]
        connection.request("GET", "/v1/files", headers={"Authorization": f"Bearer {api.key}"})
        assert connection.getresponse().status == 200
    finally:
        connection.close()
    return refusal.status


def test_an_early_refusal_reads_the_body_and_keeps_the_connection(api: Api) -> None:
    for path, purpose, key, status in (
        ("/v1/files", "fine-tune", "lt_nope", 401),
        ("/v1/files", "nonsense", api.key, 400),
        ("/v1/uploads/upload_unknown/parts", "fine-tune", api.key, 404),
        ("/v1/uploads/upload_unknown/parts", "fine-tune", "lt_nope", 401),
        ("/v1/nowhere", "fine-tune", api.key, 413),
    ):
        body = b"".join(
            [
                _field("purpose", purpose),
                b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n',
                bytes(8 * 1024 * 1024),
                b"\r\n--x--\r\n",
            ]
        )
        assert _post_and_continue(api, path, body, key) == status


@pytest.fixture
def file_id(client: openai.OpenAI) -> str:
    return client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id


def _ask(api: Api, path: str, method: str = "GET", **headers: str) -> httpx2.Response:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx2.request(method, f"{api.base_url}{path}", headers=api.headers | named)


def test_a_single_range_is_answered_with_206_and_its_place(api: Api, file_id: str) -> None:
    for asked, start, end in (
        ("bytes=0-0", 0, 1),
        ("bytes=5-9", 5, 10),
        (f"bytes={SIZE - 3}-", SIZE - 3, SIZE),
        ("bytes=-4", SIZE - 4, SIZE),
        (f"bytes=7-{SIZE * 9}", 7, SIZE),
        (f"bytes=-{SIZE * 9}", 0, SIZE),
    ):
        answer = _ask(api, f"/v1/files/{file_id}/content", range=asked)
        assert (answer.status_code, answer.content) == (206, ROWS[start:end])
        assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{SIZE}"
        assert answer.headers["content-length"] == str(end - start)
        assert answer.headers["etag"] == ETAG
    for asked in ("bytes=0-1,5-6", "rows=0-1", "bytes=9-3", "nonsense"):
        answer = _ask(api, f"/v1/files/{file_id}/content", range=asked)
        assert (answer.status_code, answer.content) == (200, ROWS)
        assert "content-range" not in answer.headers


def test_a_range_outside_is_416_with_the_size(api: Api, file_id: str) -> None:
    for asked in (f"bytes={SIZE}-", "bytes=-0"):
        answer = _ask(api, f"/v1/files/{file_id}/content", range=asked)
        assert answer.status_code == 416
        assert answer.headers["content-range"] == f"bytes */{SIZE}"
        assert answer.json()["error"]["code"] == "range_not_satisfiable"


def test_conditions_are_those_of_http(api: Api, file_id: str) -> None:
    path, other = f"/v1/files/{file_id}/content", '"another"'
    for tags, status in (
        (ETAG, 304),
        (f"{other}, {ETAG}", 304),
        (f"W/{ETAG}", 304),
        ("*", 304),
        (other, 200),
        (ETAG.strip('"'), 200),
    ):
        answer = _ask(api, path, if_none_match=tags)
        assert (answer.status_code, answer.headers["etag"]) == (status, ETAG), tags
        assert answer.content == (b"" if status == 304 else ROWS)
    for tags, status in ((ETAG, 200), ("*", 200), (other, 412), (f"W/{ETAG}", 412)):
        assert _ask(api, path, if_match=tags).status_code == status, tags
    for tag, status in (
        (ETAG, 206),
        (other, 200),
        (f"W/{ETAG}", 200),
        ("Tue, 24 Nov 2026 00:00:00 GMT", 200),
    ):
        answer = _ask(api, path, range="bytes=1-2", if_range=tag)
        assert (answer.status_code, len(answer.content)) == (status, 2 if status == 206 else SIZE), tag
    # A range outside of what has changed since is no fault: the whole is sent.
    assert _ask(api, path, range=f"bytes={SIZE}-", if_range=other).content == ROWS
    assert _ask(api, path, range=f"bytes={SIZE}-", if_none_match=ETAG).status_code == 304


def test_head_gives_size_and_tag_and_sends_no_bytes(api: Api, file_id: str) -> None:
    path = f"/v1/files/{file_id}/content"
    answer = _ask(api, path, "HEAD", range="bytes=0-3")
    assert (answer.status_code, answer.content) == (200, b"")
    whole = _ask(api, path)
    for name in ("content-length", "etag", "accept-ranges", "content-disposition", "content-type"):
        assert answer.headers[name] == whole.headers[name]
    assert (whole.headers["content-length"], whole.headers["accept-ranges"]) == (str(SIZE), "bytes")
    assert _ask(api, path, "HEAD", if_none_match=ETAG).status_code == 304
    assert _ask(api, "/v1/files/file-unknown/content", "HEAD").status_code == 404


_NAMES = {
    "rows.jsonl": 'attachment; filename="rows.jsonl"',
    'say "hi".jsonl': "attachment; filename=\"say _hi_.jsonl\"; filename*=UTF-8''say%20%22hi%22.jsonl",
    "дані 数据.jsonl": None,
    "क्\u200dष 👩\u200d🔬.jsonl": None,
    "a%20b;c=d.jsonl": "attachment; filename=\"a_20b;c=d.jsonl\"; filename*=UTF-8''a%2520b%3Bc%3Dd.jsonl",
}


def test_names_in_any_script_come_back_as_they_were_given(client: openai.OpenAI) -> None:
    for name, header in _NAMES.items():
        file = client.files.create(file=(name, ROWS), purpose="fine-tune")
        assert file.filename == client.files.retrieve(file.id).filename == name
        reported = client.files.content(file.id).response.headers["content-disposition"]
        assert header in (None, reported)
        upload = client.uploads.upload_file_chunked(
            file=ROWS, filename=name, bytes=SIZE, mime_type="text/jsonl", purpose="fine-tune"
        )
        assert upload.filename == name
        assert upload.file is not None
        assert upload.file.filename == name


def test_a_name_in_rfc_5987_form_is_read(api: Api) -> None:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--x\r\n'
        b'Content-Disposition: form-data; name="file"; filename="x"; '
        b"filename*=UTF-8''%D0%B4%D0%B0%D0%BD%D1%96.jsonl\r\n\r\n" + ROWS + b"\r\n--x--\r\n"
    )
    headers = api.headers | {"Content-Type": "multipart/form-data; boundary=x"}
    answer = httpx2.post(f"{api.base_url}/v1/files", headers=headers, content=body)
    assert answer.json()["filename"] == "дані.jsonl"


def test_bytes_that_are_missing_are_reported_before_anything_is_sent(api: Api, file_id: str) -> None:
    root = api.state.storage.local_root
    assert root is not None
    [path] = root.rglob(file_id)
    path.unlink()
    answer = _ask(api, f"/v1/files/{file_id}/content")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "artifact_corrupt")


def _publish(api: Api, job_id: str, folder: Path) -> str:
    """Give a job a model with a file of 3 MB, without training it."""
    building, name = folder / "building", "ft:tiny-llama:personal::ranges01"
    (building / "more").mkdir(parents=True)
    (building / "more" / "weights.bin").write_bytes(bytes(range(256)) * 12_000)
    manifest = seal_folder(building, folder / "sealed")
    with api.state.database.transaction() as session:
        job = session.get_one(Job, job_id)
        key = f"projects/{job.project_id}/jobs/{job.id}/e1/artifact"
        api.state.storage.put_folder(folder / "sealed", key)
        session.add(
            Model(
                id=new_id("model"),
                organization_id=job.organization_id,
                project_id=job.project_id,
                name=name,
                kind="tuned",
                base_id=job.base_id,
                base_digest="sha256:0",
                job_id=job.id,
                method="lora",
                step=1,
                artifact_key=key,
                artifact_digest=manifest.digest,
            )
        )
    return name


def test_an_interrupted_download_of_a_models_file_is_resumed(
    api: Api, client: openai.OpenAI, file_id: str, tmp_path: Path
) -> None:
    job = client.fine_tuning.jobs.create(model="tiny-llama", training_file=file_id)
    name = _publish(api, job.id, tmp_path)
    listed = _ask(api, f"/v1/models/{name}/files").json()["data"]
    [entry] = [entry for entry in listed if entry["name"] == "more/weights.bin"]
    path = f"/v1/models/{name}/files/more/weights.bin"
    head = _ask(api, path, "HEAD")
    assert (head.headers["content-length"], head.headers["etag"]) == (
        str(entry["bytes"]),
        f'"{entry["sha256"]}"',
    )
    assert head.headers["content-disposition"] == 'attachment; filename="weights.bin"'
    got = b""
    with httpx2.stream("GET", f"{api.base_url}{path}", headers=api.headers) as broken:
        for chunk in broken.iter_bytes(100_000):
            got += chunk
            if len(got) > 1_000_000:
                break
    # As `curl -C -` does.
    rest = _ask(api, path, range=f"bytes={len(got)}-", if_range=head.headers["etag"])
    assert rest.status_code == 206
    assert hashlib.sha256(got + rest.content).hexdigest() == entry["sha256"]
    done = _ask(api, path, range=f"bytes={entry['bytes']}-")
    assert (done.status_code, done.headers["content-range"]) == (416, f"bytes */{entry['bytes']}")
