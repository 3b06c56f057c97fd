"""How uploads end: cancelled, expired, completed twice at once, or left behind by a crash."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from sqlalchemy import text

from tests.conftest import Api
from tests.rows import colour_rows, jsonl
from worker.context import WorkerContext
from worker.maintenance import collect_garbage

ROWS = jsonl(colour_rows(40))


def _begin(client: openai.OpenAI, *pieces: bytes) -> tuple[str, list[str]]:
    upload = client.uploads.create(
        bytes=len(ROWS), filename="rows.jsonl", mime_type="text/jsonl", purpose="fine-tune"
    )
    return upload.id, [client.uploads.parts.create(upload.id, data=piece).id for piece in pieces]


def _execute(api: Api, statement: str, **values: object) -> None:
    with api.state.database.transaction() as session:
        session.execute(text(statement), values)


def _status(api: Api, upload_id: str) -> str:
    return str(api.ok("GET", f"/uploads/{upload_id}")["status"])


def _refuses_all(client: openai.OpenAI, upload_id: str, part_ids: list[str], status: str) -> None:
    """Hold that an upload that has ended takes nothing more and says why."""
    calls: list[Callable[[], object]] = [
        lambda: client.uploads.parts.create(upload_id, data=b"x"),
        lambda: client.uploads.complete(upload_id, part_ids=part_ids),
        lambda: client.uploads.cancel(upload_id),
    ]
    for call in calls:
        with pytest.raises(openai.BadRequestError, match=f"is {status}") as caught:
            call()
        assert caught.value.code == "invalid_upload_state"


def test_a_cancelled_upload_takes_nothing_more_and_its_parts_are_gone(
    api: Api, client: openai.OpenAI
) -> None:
    upload_id, ids = _begin(client, ROWS[:99], ROWS[99:])
    assert len(api.stored_objects()) == 2
    cancelled = client.uploads.cancel(upload_id)
    assert (cancelled.status, cancelled.file) == ("cancelled", None)
    assert api.stored_objects() == []
    _refuses_all(client, upload_id, ids, "cancelled")
    assert api.stored_objects() == []


def test_an_upload_expires_after_an_hour_and_its_parts_are_tidied(
    api: Api, client: openai.OpenAI, context: WorkerContext
) -> None:
    upload_id, ids = _begin(client, ROWS)
    fresh_id, fresh_ids = _begin(client, ROWS)
    assert _status(api, upload_id) == "pending"
    _execute(
        api,
        "UPDATE uploads SET created_at = now() - interval '61 min', expires_at = now() - interval '1 min'"
        " WHERE id = :id",
        id=upload_id,
    )
    _refuses_all(client, upload_id, ids, "expired")
    assert _status(api, upload_id) == "expired"
    collect_garbage(context, grace_seconds=3600)
    assert api.stored_objects() == sorted([*ids, *fresh_ids])
    collect_garbage(context, grace_seconds=0)
    assert api.stored_objects() == fresh_ids
    done = client.uploads.complete(fresh_id, part_ids=fresh_ids)
    collect_garbage(context, grace_seconds=0)
    assert api.stored_objects() == [done.file.id]
    assert client.files.content(done.file.id).read() == ROWS


def test_an_upload_without_requests_expires_by_the_sweep(
    api: Api, client: openai.OpenAI, context: WorkerContext
) -> None:
    upload_id, ids = _begin(client, ROWS)
    _execute(api, "UPDATE uploads SET expires_at = now(), busy_until = now() + interval '1 min'")
    collect_garbage(context, grace_seconds=0)
    # A complete is at work: its parts stay until it is done.
    assert (_status(api, upload_id), api.stored_objects()) == ("pending", ids)
    _execute(api, "UPDATE uploads SET busy_until = now()")
    collect_garbage(context, grace_seconds=0)
    assert (_status(api, upload_id), api.stored_objects()) == ("expired", [])


def test_two_completes_at_the_same_time_make_one_file(api: Api, client: openai.OpenAI) -> None:
    upload_id, ids = _begin(client, ROWS[:99], ROWS[99:])
    with ThreadPoolExecutor(4) as pool:
        answers = list(
            pool.map(lambda _: client.uploads.complete(upload_id, part_ids=ids), range(4), timeout=60)
        )
    assert {answer.status for answer in answers} == {"completed"}
    [file_id] = {answer.file.id for answer in answers if answer.file is not None}
    assert [file.id for file in client.files.list()] == [file_id]
    assert api.stored_objects() == [file_id]


def test_what_a_crash_leaves_of_an_upload_is_tidied_with_it(
    api: Api, client: openai.OpenAI, context: WorkerContext
) -> None:
    upload_id, ids = _begin(client, ROWS)
    done = client.uploads.complete(upload_id, part_ids=ids)
    root = context.storage.local_root
    [folder] = [path.parent for path in root.rglob(done.file.id)]
    # A part that got no row, a file put together twice, and one that was half written.
    for name in ("part_0", "file-0", "file-1#3"):
        (folder / name).write_bytes(b"left behind")
    collect_garbage(context, grace_seconds=0)
    assert api.stored_objects() == [done.file.id]
    client.files.delete(done.file.id)
    assert api.stored_objects() == []


def test_an_upload_is_completed_by_its_own_parts_and_not_by_another_projects(
    api: Api, client: openai.OpenAI
) -> None:
    upload_id, ids = _begin(client, ROWS)
    other = api.other_project()
    theirs, _ = _begin(other.client())
    refused = other.refused("POST", f"/uploads/{theirs}/complete", {"part_ids": ids})
    assert (refused[0], refused[2]) == (400, "part_ids.0")
    assert client.uploads.complete(upload_id, part_ids=ids).status == "completed"
