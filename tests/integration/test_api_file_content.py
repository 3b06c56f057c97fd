"""Bytes of files and of models over HTTP: ranges, conditions, names, and going on where one broke off."""

import hashlib
from pathlib import Path

import httpx2
import openai
import pytest

from db.tables import Job, Model
from luthier.core.ids import new_id
from luthier.storage.manifests import seal_folder
from tests.conftest import Api
from tests.rows import colour_rows, jsonl

ROWS = jsonl(colour_rows(40))
SIZE = len(ROWS)
ETAG = f'"{hashlib.sha256(ROWS).hexdigest()}"'


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


def test_a_models_file_is_downloaded_on_from_where_it_broke_off(
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
    # As `curl -C -` continues.
    rest = _ask(api, path, range=f"bytes={len(got)}-", if_range=head.headers["etag"])
    assert rest.status_code == 206
    assert hashlib.sha256(got + rest.content).hexdigest() == entry["sha256"]
    done = _ask(api, path, range=f"bytes={entry['bytes']}-")
    assert (done.status_code, done.headers["content-range"]) == (416, f"bytes */{entry['bytes']}")
