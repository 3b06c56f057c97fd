"""The uploads resource with the OpenAI SDK, its answers held to the SDK's own types."""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
from openai.types import Upload

from luthier.core.settings import MIB
from tests.conftest import Api
from tests.rows import colour_rows, jsonl

ROWS = jsonl(colour_rows(40))


def _create(client: openai.OpenAI) -> Upload:
    return client.uploads.create(
        bytes=len(ROWS), filename="rows.jsonl", mime_type="text/jsonl", purpose="fine-tune"
    )


def _refused(call: Callable[[], object], param: str | None, code: str | None = None) -> str:
    with pytest.raises(openai.BadRequestError) as caught:
        call()
    assert caught.value.param == param, caught.value.message
    assert code in (None, caught.value.code)
    return caught.value.message


def test_the_sdks_chunked_helper_makes_a_file_that_a_job_takes(
    api: Api, client: openai.OpenAI, tmp_path: Path
) -> None:
    path = tmp_path / "навчання.jsonl"
    path.write_bytes(ROWS)
    md5 = hashlib.md5(ROWS).hexdigest().upper()
    upload = client.uploads.upload_file_chunked(
        file=path, mime_type="text/jsonl", purpose="fine-tune", part_size=1000, md5=md5
    )
    assert (upload.status, upload.bytes, upload.filename) == ("completed", len(ROWS), "навчання.jsonl")
    assert upload.expires_at == upload.created_at + 3600
    assert upload.file == client.files.retrieve(upload.file.id)
    assert (upload.file.bytes, upload.file.status) == (len(ROWS), "processed")
    assert upload.file.purpose == "fine-tune"
    assert client.files.content(upload.file.id).read() == ROWS
    assert len(api.stored_objects()) == 1
    job = client.fine_tuning.jobs.create(model="tiny-llama", training_file=upload.file.id)
    assert job.training_file == upload.file.id


def test_parts_may_come_at_the_same_time_and_their_order_is_said_at_the_end(client: openai.OpenAI) -> None:
    pieces = [ROWS[place : place + 700] for place in range(0, len(ROWS), 700)]
    upload = _create(client)
    with ThreadPoolExecutor(4) as pool:
        parts = [*pool.map(lambda piece: client.uploads.parts.create(upload.id, data=piece), pieces[::-1])]
    assert {part.upload_id for part in parts} == {upload.id}
    ids = [part.id for part in parts]
    # The text of the first row in the middle of the file: caught, and reported as a broken line.
    _refused(lambda: client.uploads.complete(upload.id, part_ids=ids), "part_ids", "invalid_file_format")
    done = client.uploads.complete(upload.id, part_ids=ids[::-1])
    assert client.files.content(done.file.id).read() == ROWS


def test_a_part_of_exactly_64_mib_is_accepted_and_complete_nests_the_file(
    api: Api, client: openai.OpenAI
) -> None:
    upload = client.uploads.create(
        bytes=64 * MIB + 5, filename="a.bin", mime_type="application/octet-stream", purpose="user_data"
    )
    whole = bytes(64 * MIB)
    message = _refused(lambda: client.uploads.parts.create(upload.id, data=whole + b"x"), "data")
    assert "64 MiB" in message
    assert api.stored_objects() == []
    ids = [client.uploads.parts.create(upload.id, data=data).id for data in (b"12345", whole)]
    done = client.uploads.complete(upload.id, part_ids=ids[::-1])
    part = api.ask("GET", f"/files/{done.file.id}/content", headers={"Range": "bytes=-7"})
    assert part.content == b"\0\x0012345"


def test_a_broken_line_is_named_and_leaves_the_upload_to_be_completed_otherwise(
    api: Api, client: openai.OpenAI
) -> None:
    lines = ROWS.splitlines(keepends=True)
    broken, good = b'{"messages": [}'.ljust(len(lines[20]) - 1) + b"\n", lines[20]
    upload = _create(client)
    head, bad, mended, tail = (
        client.uploads.parts.create(upload.id, data=data).id
        for data in (b"".join(lines[:20]), broken, good, b"".join(lines[21:]))
    )
    message = _refused(
        lambda: client.uploads.complete(upload.id, part_ids=[head, bad, tail]),
        "part_ids",
        "invalid_file_format",
    )
    assert "Line 21, column 15" in message
    assert len(api.stored_objects()) == 4
    assert client.files.list().data == []
    done = client.uploads.complete(upload.id, part_ids=[head, mended, tail])
    assert done.status == "completed"


def test_a_complete_sent_again_answers_the_same_file_and_another_one_is_refused(
    api: Api, client: openai.OpenAI
) -> None:
    upload = _create(client)
    ids = [client.uploads.parts.create(upload.id, data=data).id for data in (ROWS[:99], ROWS[99:])]
    done = client.uploads.complete(upload.id, part_ids=ids)
    assert client.uploads.complete(upload.id, part_ids=ids) == done
    assert len(client.files.list().data) == 1
    for call in (
        lambda: client.uploads.complete(upload.id, part_ids=ids[::-1]),
        lambda: client.uploads.complete(upload.id, part_ids=ids, md5="0" * 32),
        lambda: client.uploads.parts.create(upload.id, data=b"more"),
        lambda: client.uploads.cancel(upload.id),
    ):
        assert "completed" in _refused(call, "id", "invalid_upload_state")
    client.files.delete(done.file.id)
    assert client.uploads.complete(upload.id, part_ids=ids).file is None


def test_what_does_not_add_up_is_refused_before_bytes_move(client: openai.OpenAI) -> None:
    upload, other = _create(client), _create(client)
    ids = [client.uploads.parts.create(upload.id, data=data).id for data in (ROWS[:99], ROWS[99:])]
    foreign = client.uploads.parts.create(other.id, data=ROWS).id
    for part_ids, param in (
        ([*ids, "part_unknown"], "part_ids.2"),
        ([foreign], "part_ids.0"),
        (ids[:1], "part_ids"),
        ([ids[0], ids[0], ids[1]], "part_ids"),
        ([], "part_ids"),
    ):
        _refused(lambda ids=part_ids: client.uploads.complete(upload.id, part_ids=ids), param)
    _refused(lambda: client.uploads.complete(upload.id, part_ids=ids, md5="0" * 32), "md5")
    _refused(lambda: client.uploads.complete(upload.id, part_ids=ids, md5="no hash"), "md5")
    # Parts may be sent anew, but not without end, and never one beyond the whole.
    _refused(lambda: client.uploads.parts.create(upload.id, data=ROWS + b"\n"), "data")
    client.uploads.parts.create(upload.id, data=ROWS)
    _refused(lambda: client.uploads.parts.create(upload.id, data=b"{"), "data")
    assert client.uploads.complete(upload.id, part_ids=ids).file is not None


def test_an_upload_is_refused_by_the_field_that_is_wrong(api: Api) -> None:
    good = {"bytes": 10, "filename": "a.jsonl", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    for changes, param in (
        ({"bytes": 0}, "bytes"),
        ({"bytes": "10"}, "bytes"),
        ({"bytes": 8 * 1024**3 + 1}, "bytes"),
        ({"filename": "x" * 256}, "filename"),
        ({"mime_type": "image/png"}, "mime_type"),
        ({"purpose": "fine-tune-results"}, "purpose"),
        ({"purpose": "finetune"}, "purpose"),
        ({"colour": "red"}, "colour"),
        ({"expires_after": {"anchor": "created_at", "seconds": 3599}}, "expires_after.seconds"),
        ({"expires_after": {"anchor": "now", "seconds": 3600}}, "expires_after.anchor"),
        ({"expires_after": {"anchor": "created_at"}}, "expires_after.seconds"),
    ):
        status, _, found, message = api.refused("POST", "/uploads", good | changes)
        assert (status, found) == (400, param), message
    assert api.ok("POST", "/uploads", good | {"bytes": 8 * 1024**3, "expires_after": None})


def test_a_part_is_refused_by_what_is_wrong_with_its_form(api: Api, client: openai.OpenAI) -> None:
    path = f"/uploads/{_create(client).id}/parts"
    for files, data, param in (
        ({"file": ("a", b"x")}, {}, "data"),
        ({"data": ("a", b"")}, {}, "data"),
        ([("data", ("a", b"x")), ("data", ("b", b"y"))], {}, "data"),
        ({"data": ("a", b"x")}, {"more": "1"}, "more"),
    ):
        status, _, found, message = api.refused("POST", path, files=files, data=data)
        assert (status, found) == (400, param), message
    assert api.stored_objects() == []
