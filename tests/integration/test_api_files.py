"""The files resource over HTTP, with the OpenAI SDK and by hand."""

import httpx2
import openai
import pytest

from tests.conftest import Api
from tests.rows import colour_rows, jsonl


@pytest.fixture
def client(api: Api) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{api.base_url}/v1", api_key=api.key, max_retries=0)


def _objects(api: Api) -> list[str]:
    root = api.state.storage.local_root
    assert root is not None
    return [str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()]


def test_a_file_comes_back_as_it_was_sent(api: Api, client: openai.OpenAI) -> None:
    content = jsonl(colour_rows())
    created = client.files.create(file=("rows.jsonl", content), purpose="fine-tune")
    assert (created.object, created.bytes, created.status) == ("file", len(content), "processed")
    assert created.filename == "rows.jsonl"
    assert client.files.retrieve(created.id) == created
    assert client.files.content(created.id).read() == content
    assert [file.id for file in client.files.list(purpose="fine-tune")] == [created.id]
    part = httpx2.get(
        f"{api.base_url}/v1/files/{created.id}/content", headers=api.headers | {"Range": "bytes=5-9"}
    )
    assert (part.status_code, part.content) == (206, content[5:10])


def test_a_deleted_file_is_gone_with_its_bytes(api: Api, client: openai.OpenAI) -> None:
    created = client.files.create(file=("rows.jsonl", jsonl(colour_rows())), purpose="fine-tune")
    assert client.files.delete(created.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(created.id)
    assert _objects(api) == []


def test_files_page_by_cursor_without_skip_or_repeat(client: openai.OpenAI) -> None:
    made = [
        client.files.create(file=(f"{n}.jsonl", jsonl(colour_rows())), purpose="fine-tune").id
        for n in range(5)
    ]
    paged = [file.id for file in client.files.list(limit=2)]
    assert paged == made[::-1]
    assert [file.id for file in client.files.list(limit=2, order="asc")] == made
    assert client.files.list(limit=0).data == []


def test_a_broken_line_is_named_and_nothing_is_kept(api: Api, client: openai.OpenAI) -> None:
    lines = jsonl(colour_rows()).splitlines(keepends=True)
    lines[6] = b'{"messages": [}\n'
    with pytest.raises(openai.BadRequestError) as caught:
        client.files.create(file=("rows.jsonl", b"".join(lines)), purpose="fine-tune")
    assert caught.value.code == "invalid_file_format"
    assert caught.value.param == "file"
    assert "line 7" in str(caught.value).lower()
    assert client.files.list().data == []
    assert _objects(api) == []


def test_a_form_is_refused_by_the_field_that_is_wrong(api: Api) -> None:
    url, content = f"{api.base_url}/v1/files", jsonl(colour_rows())
    cases: list[tuple[dict[str, str], dict[str, tuple[str, bytes]], str]] = [
        ({}, {"file": ("a.jsonl", content)}, "purpose"),
        ({"purpose": "nonsense"}, {"file": ("a.jsonl", content)}, "purpose"),
        ({"purpose": "fine-tune-results"}, {"file": ("a.jsonl", content)}, "purpose"),
        ({"purpose": "fine-tune", "colour": "red"}, {"file": ("a.jsonl", content)}, "colour"),
        ({"purpose": "fine-tune"}, {"data": ("a.jsonl", content)}, "file"),
        ({"purpose": "fine-tune"}, {"file": ("a.jsonl", b"")}, "file"),
    ]
    for data, files, param in cases:
        answer = httpx2.post(url, headers=api.headers, data=data, files=files)
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (400, param), error
        assert set(error) == {"message", "type", "param", "code"}
    cut = httpx2.post(
        url,
        headers=api.headers | {"Content-Type": "multipart/form-data; boundary=x"},
        content=b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n' + content,
    )
    assert cut.status_code == 400
    assert _objects(api) == []


def test_purpose_may_follow_the_file(api: Api) -> None:
    body = (
        b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
        + jsonl(colour_rows())
        + b'\r\n--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n--x--\r\n'
    )
    answer = httpx2.post(
        f"{api.base_url}/v1/files",
        headers=api.headers | {"Content-Type": "multipart/form-data; boundary=x"},
        content=body,
    )
    assert answer.status_code == 200, answer.text


def test_an_upload_over_the_limit_is_refused_and_not_kept(api: Api) -> None:
    limit = api.state.settings.max_upload_bytes
    object.__setattr__(
        api.state, "settings", api.state.settings.model_copy(update={"max_upload_bytes": 1000})
    )
    try:
        answer = httpx2.post(
            f"{api.base_url}/v1/files",
            headers=api.headers,
            data={"purpose": "fine-tune"},
            files={"file": ("a.jsonl", jsonl(colour_rows(100)))},
        )
    finally:
        restored = api.state.settings.model_copy(update={"max_upload_bytes": limit})
        object.__setattr__(api.state, "settings", restored)
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "file_too_large")
    assert _objects(api) == []
