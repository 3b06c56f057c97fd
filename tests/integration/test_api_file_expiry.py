"""Files that expire, purposes, and deletes that delete."""

import openai
import pytest
from sqlalchemy import text

from luthier.core.errors import UnavailableError
from tests.conftest import Api
from tests.rows import colour_rows, jsonl
from worker.context import WorkerContext
from worker.maintenance import collect_garbage

ROWS = jsonl(colour_rows())
DAY = 24 * 3600


def _let_expire(api: Api, file_id: str) -> None:
    with api.state.database.transaction() as session:
        session.execute(text("UPDATE files SET expires_at = now() WHERE id = :id"), {"id": file_id})


def test_a_file_expires_as_many_seconds_after_its_creation_as_was_asked(client: openai.OpenAI) -> None:
    hour, month = ({"anchor": "created_at", "seconds": seconds} for seconds in (3600, 30 * DAY))
    made = client.files.create(file=("a.jsonl", ROWS), purpose="fine-tune", expires_after=hour)
    assert made.expires_at == made.created_at + 3600
    assert client.files.retrieve(made.id) == made
    upload = client.uploads.create(
        bytes=len(ROWS), filename="b", mime_type="text/jsonl", purpose="fine-tune", expires_after=month
    )
    part = client.uploads.parts.create(upload.id, data=ROWS)
    done = client.uploads.complete(upload.id, part_ids=[part.id])
    assert done.file.expires_at == done.file.created_at + 30 * DAY
    assert done.expires_at == done.created_at + 3600
    assert client.files.create(file=("c.jsonl", ROWS), purpose="fine-tune").expires_at is None


def test_a_wrong_expiry_is_refused_by_its_bracketed_field(api: Api) -> None:
    anchor, seconds = "expires_after[anchor]", "expires_after[seconds]"
    for data, param in (
        ({anchor: "created_at", seconds: "3599"}, seconds),
        ({anchor: "created_at", seconds: str(30 * DAY + 1)}, seconds),
        ({anchor: "created_at", seconds: "-1"}, seconds),
        ({anchor: "created_at", seconds: "soon"}, seconds),
        ({anchor: "created_at", seconds: "3600.0"}, seconds),
        ({anchor: "last_active_at", seconds: "3600"}, anchor),
        ({anchor: "created_at"}, seconds),
        ({seconds: "3600"}, anchor),
        ({"expires_after[when]": "3600"}, "expires_after[when]"),
        ({"expires_after": "3600"}, "expires_after"),
    ):
        form = {"data": {"purpose": "fine-tune"} | data, "files": {"file": ("a.jsonl", ROWS)}}
        status, _, found, message = api.refused("POST", "/files", **form)
        assert (status, found) == (400, param), message
        assert param in message
    assert api.stored_objects() == []


def test_an_expired_file_is_unknown_and_then_gone(
    api: Api, client: openai.OpenAI, context: WorkerContext
) -> None:
    expired, kept = api.upload_file(ROWS), api.upload_file(ROWS)
    _let_expire(api, expired)
    for call in (client.files.retrieve, client.files.content, client.files.delete):
        with pytest.raises(openai.NotFoundError):
            call(expired)
    assert [entry.id for entry in client.files.list()] == [kept]
    # Pages that began before it expired continue behind it.
    assert [entry.id for entry in client.files.list(after=expired, order="asc")] == [kept]
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(model="tiny-llama", training_file=expired)
    assert refused.value.param == "training_file"
    assert api.stored_objects() == [expired, kept]
    collect_garbage(context, grace_seconds=0)
    assert api.stored_objects() == [kept]


def test_an_expired_file_stays_until_the_last_job_that_reads_it_has_ended(
    api: Api, client: openai.OpenAI, context: WorkerContext
) -> None:
    train, valid = api.upload_file(ROWS), api.upload_file(ROWS)
    job_id = api.create_job(train, validation_file=valid)["id"]
    for file_id in (train, valid):
        _let_expire(api, file_id)
    collect_garbage(context, grace_seconds=0)
    assert api.stored_objects() == [train, valid]
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(train)
    client.fine_tuning.jobs.cancel(job_id)
    collect_garbage(context, grace_seconds=0)
    assert api.stored_objects() == []


def test_bytes_that_could_not_be_deleted_are_deleted_by_the_sweep(
    api: Api, client: openai.OpenAI, context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    file_id = api.upload_file(ROWS)

    def fail(_key: str) -> None:
        raise UnavailableError("storage is away")

    with monkeypatch.context() as patched:
        patched.setattr(api.state.storage, "delete", fail)
        assert client.files.delete(file_id).deleted
    assert api.stored_objects() == [file_id]
    with pytest.raises(openai.NotFoundError):
        client.files.content(file_id)
    collect_garbage(context, grace_seconds=0)
    assert api.stored_objects() == []


def test_every_purpose_of_openai_is_taken_and_only_training_files_are_looked_into(api: Api) -> None:
    # Lenient: the SDK's type of an answer lacks `evals`, which its own requests have.
    client = api.client(is_strict=False)
    content = b"\x89PNG no rows at all"
    purposes = ("assistants", "batch", "vision", "user_data", "evals")
    for purpose in purposes:
        made = client.files.create(file=("a.png", content), purpose=purpose)
        assert (made.purpose, made.status, made.bytes) == (purpose, "processed", len(content))
        assert client.files.content(made.id).read() == content
        assert [file.id for file in client.files.list(purpose=purpose)] == [made.id]
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("a.png", content), purpose="fine-tune")
    assert refused.value.code == "invalid_file_format"
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(model="tiny-llama", training_file=made.id)
    assert refused.value.code == "invalid_file_purpose"
    for purpose in ("fine-tune-results", "assistants_output", "batch_output"):
        with pytest.raises(openai.BadRequestError, match="made by the service") as refused:
            client.files.create(file=("a.png", content), purpose=purpose)
        assert (refused.value.code, refused.value.param) == ("unsupported_value", "purpose")
    assert len(api.stored_objects()) == len(purposes)
