"""What real clients break on where a server is sloppy, as far as it concerns files and uploads.

The numbers are those of the contract's checklist; 46 is with the uploads.
"""

import http.client
import json
from urllib.parse import urlsplit

import httpx2
import openai
import pytest

from db.tables import Job
from services.files import files
from services.files.files import StoredFile
from tests.conftest import Api
from tests.rows import colour_rows, jsonl

ROWS = jsonl(colour_rows())


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
    for turn in range(len(parts)):
        body = b"".join([*parts[turn:], *parts[:turn], b"--x--\r\n"])
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
