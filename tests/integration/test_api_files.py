"""Files over HTTP: upload, list, retrieve, delete; content with ranges, conditions and names."""

import hashlib
import http.client
import json
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import openai
import pytest

from db.tables import Job
from luthier.core.settings import MIB
from luthier.storage.manifests import seal_folder
from services.files import files
from services.files.files import StoredFile
from tests.aliases import add_model
from tests.conftest import Api
from tests.rows import colour_rows, jsonl

ROWS = jsonl(colour_rows(40))
SIZE = len(ROWS)
ETAG = f'"{hashlib.sha256(ROWS).hexdigest()}"'


@pytest.fixture
def file_id(api: Api) -> str:
    return api.upload_file(ROWS)


def test_a_file_comes_back_as_it_was_sent_until_it_is_deleted_with_its_bytes(
    api: Api, client: openai.OpenAI
) -> None:
    created = client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune")
    assert (created.object, created.bytes, created.status) == ("file", SIZE, "processed")
    assert created.filename == "rows.jsonl"
    assert client.files.retrieve(created.id) == created
    assert client.files.content(created.id).read() == ROWS
    assert [file.id for file in client.files.list(purpose="fine-tune")] == [created.id]
    assert client.files.delete(created.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(created.id)
    assert api.stored_objects() == []


def test_a_broken_line_is_named_and_nothing_is_kept(api: Api, client: openai.OpenAI) -> None:
    lines = ROWS.splitlines(keepends=True)
    lines[6] = b'{"messages": [}\n'
    with pytest.raises(openai.BadRequestError, match="Line 7") as caught:
        client.files.create(file=("rows.jsonl", b"".join(lines)), purpose="fine-tune")
    assert (caught.value.code, caught.value.param) == ("invalid_file_format", "file")
    assert client.files.list().data == []
    assert api.stored_objects() == []


def test_a_form_is_refused_by_the_field_that_is_wrong(api: Api) -> None:
    good = {"file": ("a.jsonl", ROWS)}
    for data, sent, param in (
        ({}, good, "purpose"),
        ({"purpose": "nonsense"}, good, "purpose"),
        ({"purpose": "fine-tune", "colour": "red"}, good, "colour"),
        ({"purpose": "fine-tune"}, {"data": ("a.jsonl", ROWS)}, "file"),
        ({"purpose": "fine-tune"}, {"file": ("a.jsonl", b"")}, "file"),
    ):
        status, _, found, _ = api.refused("POST", "/files", data=data, files=sent)
        assert (status, found) == (400, param)
    assert _post_form(api, _FILE_HEAD, ROWS).status_code == 400
    assert api.stored_objects() == []


_FILE_HEAD = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
_MULTIPART = {"Content-Type": "multipart/form-data; boundary=x"}


def _field(name: str, value: str) -> bytes:
    return f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode()


def _post_form(api: Api, *parts: bytes) -> httpx2.Response:
    return api.ask("POST", "/files", content=b"".join(parts), headers=_MULTIPART)


def test_fields_of_a_form_come_in_any_order_with_bracketed_names_and_seconds_as_text(api: Api) -> None:
    parts = [
        _field("purpose", "fine-tune"),
        _field("expires_after[anchor]", "created_at"),
        _field("expires_after[seconds]", "86400"),
        _FILE_HEAD.replace(b"\r\n\r\n", b"\r\nContent-Type: text/plain\r\n\r\n") + ROWS + b"\r\n",
    ]
    for start in range(len(parts)):
        answer = _post_form(api, *parts[start:], *parts[:start], b"--x--\r\n")
        made = answer.json()
        assert answer.status_code == 200, answer.text
        assert (made["bytes"], made["expires_at"]) == (SIZE, made["created_at"] + 86400)


def test_a_file_without_a_name_is_processed_and_taken_for_training(client: openai.OpenAI) -> None:
    made = client.files.create(file=ROWS, purpose="fine-tune")
    assert (made.filename, made.purpose) == ("upload", "fine-tune")
    assert client.files.wait_for_processing(made.id, poll_interval=60, max_wait_seconds=1) == made
    assert client.fine_tuning.jobs.create(model="tiny-llama", training_file=made.id).training_file == made.id


def test_content_is_raw_bytes_whatever_is_accepted(api: Api, client: openai.OpenAI, file_id: str) -> None:
    for accepted in ("application/binary", "application/json", "image/png;q=0.1", "*/*"):
        answer = _ask(api, f"/files/{file_id}/content", accept=accepted)
        assert (answer.status_code, answer.content) == (200, ROWS)
        assert answer.headers["content-length"] == str(SIZE)
    with pytest.warns(DeprecationWarning):
        assert client.files.retrieve_content(file_id) == ROWS.decode()


def test_has_more_is_always_there_and_exact(api: Api) -> None:
    made = [api.upload_file(ROWS) for _ in range(3)]
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
        page = api.ok("GET", f"/files{query}")
        assert page["object"] == "list"
        assert ([file["id"] for file in page["data"]], page["has_more"]) == (ids, has_more), query
        assert (page["first_id"], page["last_id"]) == ((ids[0], ids[-1]) if ids else (None, None))
    for query, param in (("limit=-1", "limit"), ("limit=10001", "limit"), ("limit=x", "limit"),
                         ("order=newest", "order"), ("after=file-unknown", "after")):  # fmt: skip
        status, _, found, _ = api.refused("GET", f"/files?{query}")
        assert (status, found) == (400, param), query


def test_pages_neither_skip_nor_repeat_while_files_come_and_go(api: Api, client: openai.OpenAI) -> None:
    made = [api.upload_file(ROWS) for _ in range(6)]
    with api.state.database.transaction() as session:
        # All of one moment: only the id distinguishes them.
        session.query(files.File).update({"created_at": "2026-01-01T00:00:00Z"})
    first = client.files.list(limit=2)
    assert [file.id for file in first.data] == made[:3:-1]
    api.upload_file(ROWS)
    client.files.delete(made[4])
    second = first.get_next_page()
    assert [file.id for file in second.data] == [made[3], made[2]]
    assert [file.id for file in client.files.list(limit=1, order="asc")][:4] == made[:4]


def test_a_result_file_is_found_by_id_and_purpose_and_is_plain_csv(
    api: Api, client: openai.OpenAI, file_id: str
) -> None:
    job_id = api.create_job(file_id)["id"]
    content = b"step,train_loss\n1,0.5\n"
    stored = StoredFile("file-result", "step_metrics.csv", files.RESULTS_PURPOSE, len(content), 1, "0", "r")
    api.state.storage.put_bytes("r", content)
    with api.state.database.transaction() as session:
        job = session.get_one(Job, job_id)
        job.result_file_id = files.record(session, job, stored).id
    [result_id] = client.fine_tuning.jobs.retrieve(job_id).result_files
    assert client.files.retrieve(result_id).purpose == "fine-tune-results"
    assert [file.id for file in client.files.list(purpose="fine-tune-results")] == [result_id]
    assert client.files.content(result_id).text == content.decode()


def _post_and_continue(api: Api, path: str, body: bytes, key: str) -> int:
    """Return the status of a POST, after another request on the same connection has been answered."""
    headers = {"Authorization": f"Bearer {key}"} | _MULTIPART
    connection = http.client.HTTPConnection(urlsplit(api.base_url).netloc, timeout=30)
    connection.connect()
    # A connection that the server closes is not opened again in silence.
    connection.auto_open = False
    try:
        connection.request("POST", path, body=body, headers=headers)
        refusal = connection.getresponse()
        assert json.loads(refusal.read())["error"]["message"]
        connection.request("GET", "/v1/files", headers=api.headers)
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
        body = _field("purpose", purpose) + _FILE_HEAD + bytes(8 * MIB) + b"\r\n--x--\r\n"
        assert _post_and_continue(api, path, body, key) == status


def _ask(api: Api, path: str, method: str = "GET", **headers: str) -> httpx2.Response:
    return api.ask(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})


def test_a_single_range_is_answered_with_206_and_its_place(api: Api, file_id: str) -> None:
    for asked, start, end in (("bytes=5-9", 5, 10), ("bytes=-4", SIZE - 4, SIZE)):
        answer = _ask(api, f"/files/{file_id}/content", range=asked)
        assert (answer.status_code, answer.content) == (206, ROWS[start:end])
        assert answer.headers["content-range"] == f"bytes {start}-{end - 1}/{SIZE}"
        assert answer.headers["content-length"] == str(end - start)
        assert answer.headers["etag"] == ETAG
    several = _ask(api, f"/files/{file_id}/content", range="bytes=0-1,5-6")
    assert (several.status_code, several.content) == (200, ROWS)
    assert "content-range" not in several.headers
    outside = _ask(api, f"/files/{file_id}/content", range=f"bytes={SIZE}-")
    assert outside.status_code == 416
    assert outside.headers["content-range"] == f"bytes */{SIZE}"
    assert outside.json()["error"]["code"] == "range_not_satisfiable"


def test_conditions_are_those_of_http(api: Api, file_id: str) -> None:
    path, other = f"/files/{file_id}/content", '"another"'
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
    path = f"/files/{file_id}/content"
    answer = _ask(api, path, "HEAD", range="bytes=0-3")
    assert (answer.status_code, answer.content) == (200, b"")
    whole = _ask(api, path)
    for name in ("content-length", "etag", "accept-ranges", "content-disposition", "content-type"):
        assert answer.headers[name] == whole.headers[name]
    assert (whole.headers["content-length"], whole.headers["accept-ranges"]) == (str(SIZE), "bytes")
    assert _ask(api, path, "HEAD", if_none_match=ETAG).status_code == 304
    assert _ask(api, "/files/file-unknown/content", "HEAD").status_code == 404


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
        assert upload.file.filename == name


def test_bytes_that_are_missing_are_reported_before_anything_is_sent(api: Api, file_id: str) -> None:
    root = api.state.storage.local_root
    [path] = root.rglob(file_id)
    path.unlink()
    answer = _ask(api, f"/files/{file_id}/content")
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
        digest = manifest.digest
        add_model(session, job, name, step=1, artifact_key=key, artifact_digest=digest)
    return name


def test_an_interrupted_download_of_a_models_file_is_resumed(api: Api, file_id: str, tmp_path: Path) -> None:
    name = _publish(api, api.create_job(file_id)["id"], tmp_path)
    listed = _ask(api, f"/models/{name}/files").json()["data"]
    [entry] = [entry for entry in listed if entry["name"] == "more/weights.bin"]
    path = f"/models/{name}/files/more/weights.bin"
    head = _ask(api, path, "HEAD")
    size_and_tag = (head.headers["content-length"], head.headers["etag"])
    assert size_and_tag == (str(entry["bytes"]), f'"{entry["sha256"]}"')
    assert head.headers["content-disposition"] == 'attachment; filename="weights.bin"'
    got = b""
    with httpx2.stream("GET", f"{api.base_url}/v1{path}", headers=api.headers) as broken:
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
