"""How uploads end: cancelled, expired, completed twice at once, or left behind by a crash."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx2
import openai
import pytest
from sqlalchemy import text

from luthier.core.settings import Settings
from tests.conftest import Api
from tests.integration.wire import stored_objects
from tests.rows import colour_rows, jsonl
from worker.context import WorkerContext, make_context
from worker.maintenance import collect_garbage

ROWS = jsonl(colour_rows(40))


@pytest.fixture
def context(settings: Settings, api: Api) -> WorkerContext:
    return make_context(settings)


def _begin(client: openai.OpenAI, *pieces: bytes) -> tuple[str, list[str]]:
    upload = client.uploads.create(
        bytes=len(ROWS), filename="rows.jsonl", mime_type="text/jsonl", purpose="fine-tune"
    )
    return upload.id, [client.uploads.parts.create(upload.id, data=piece).id for piece in pieces]


def _execute(api: Api, statement: str, **values: object) -> None:
    with api.state.database.transaction() as session:
        session.execute(text(statement), values)


def _states(api: Api, upload_id: str) -> str:
    answer = httpx2.get(f"{api.base_url}/v1/uploads/{upload_id}", headers=api.headers)
    status: str = answer.json()["status"]
    return status


def test_a_cancelled_upload_takes_nothing_more_and_its_parts_are_gone(
    api: Api, client: openai.OpenAI
) -> None:
    upload_id, ids = _begin(client, ROWS[:99], ROWS[99:])
    assert len(stored_objects(api)) == 2
    cancelled = client.uploads.cancel(upload_id)
    assert (cancelled.status, cancelled.file) == ("cancelled", None)
    assert stored_objects(api) == []
    calls: list[Callable[[], object]] = [
        lambda: client.uploads.cancel(upload_id),
        lambda: client.uploads.complete(upload_id, part_ids=ids),
        lambda: client.uploads.parts.create(upload_id, data=b"x"),
    ]
    for call in calls:
        with pytest.raises(openai.BadRequestError, match="is cancelled") as caught:
            call()
        assert caught.value.code == "invalid_upload_state"
    assert stored_objects(api) == []


def test_an_upload_expires_after_an_hour_and_its_parts_are_tidied(
    api: Api, client: openai.OpenAI, context: WorkerContext
) -> None:
    upload_id, ids = _begin(client, ROWS)
    fresh_id, fresh_ids = _begin(client, ROWS)
    assert _states(api, upload_id) == "pending"
    _execute(
        api,
        "UPDATE uploads SET created_at = now() - interval '61 min', expires_at = now() - interval '1 min'"
        " WHERE id = :id",
        id=upload_id,
    )
    calls: list[Callable[[], object]] = [
        lambda: client.uploads.parts.create(upload_id, data=b"x"),
        lambda: client.uploads.complete(upload_id, part_ids=ids),
        lambda: client.uploads.cancel(upload_id),
    ]
    for call in calls:
        with pytest.raises(openai.BadRequestError, match="is expired"):
            call()
    assert _states(api, upload_id) == "expired"
    collect_garbage(context, grace_seconds=3600)
    assert stored_objects(api) == sorted([*ids, *fresh_ids])
    collect_garbage(context, grace_seconds=0)
    assert stored_objects(api) == fresh_ids
    done = client.uploads.complete(fresh_id, part_ids=fresh_ids)
    collect_garbage(context, grace_seconds=0)
    assert done.file is not None
    assert stored_objects(api) == [done.file.id]
    assert client.files.content(done.file.id).read() == ROWS


def test_an_upload_without_requests_expires_by_the_sweep(
    api: Api, client: openai.OpenAI, context: WorkerContext
) -> None:
    upload_id, ids = _begin(client, ROWS)
    _execute(api, "UPDATE uploads SET expires_at = now(), busy_until = now() + interval '1 min'")
    collect_garbage(context, grace_seconds=0)
    # A complete is at work: its parts stay until it is done.
    assert (_states(api, upload_id), stored_objects(api)) == ("pending", ids)
    _execute(api, "UPDATE uploads SET busy_until = now()")
    collect_garbage(context, grace_seconds=0)
    assert (_states(api, upload_id), stored_objects(api)) == ("expired", [])


def test_two_completes_at_the_same_time_make_one_file(api: Api, client: openai.OpenAI) -> None:
    upload_id, ids = _begin(client, ROWS[:99], ROWS[99:])
    with ThreadPoolExecutor(4) as pool:
        answers = list(
            pool.map(lambda _: client.uploads.complete(upload_id, part_ids=ids), range(4), timeout=60)
        )
    assert {answer.status for answer in answers} == {"completed"}
    [file_id] = {answer.file.id for answer in answers if answer.file is not None}
    assert [file.id for file in client.files.list()] == [file_id]
    assert stored_objects(api) == [file_id]


def test_what_a_crash_leaves_of_an_upload_is_tidied_with_it(
    api: Api, client: openai.OpenAI, context: WorkerContext
) -> None:
    upload_id, ids = _begin(client, ROWS)
    done = client.uploads.complete(upload_id, part_ids=ids)
    assert done.file is not None
    root = context.storage.local_root
    assert root is not None
    [folder] = [path.parent for path in root.rglob(done.file.id)]
    # A part that got no row, a file put together twice, and one that was half written.
    for name in ("part_0", "file-0", "file-1#3"):
        (folder / name).write_bytes(b"left behind")
    collect_garbage(context, grace_seconds=0)
    assert stored_objects(api) == [done.file.id]
    client.files.delete(done.file.id)
    assert stored_objects(api) == []


def test_another_projects_upload_and_parts_are_404(api: Api, client: openai.OpenAI) -> None:
    upload_id, ids = _begin(client, ROWS)
    body = {"name": "other", "project": "other"}
    key = httpx2.post(f"{api.base_url}/v1/keys", headers=api.headers, json=body).json()["key"]
    headers = {"Authorization": f"Bearer {key}"}
    base = f"{api.base_url}/v1/uploads"
    for name in (upload_id, "upload_unknown"):
        answers = [
            httpx2.post(f"{base}/{name}/parts", headers=headers, files={"data": ("upload", b"x")}),
            httpx2.post(f"{base}/{name}/complete", headers=headers, json={"part_ids": ids}),
            httpx2.post(f"{base}/{name}/cancel", headers=headers),
            httpx2.get(f"{base}/{name}", headers=headers),
        ]
        for answer in answers:
            assert answer.status_code == 404
            assert answer.json()["error"]["message"] == f"No such Upload object: {name}"
    theirs = httpx2.post(
        base,
        headers=headers,
        json={"bytes": len(ROWS), "filename": "a", "mime_type": "text/jsonl", "purpose": "fine-tune"},
    ).json()
    answer = httpx2.post(f"{base}/{theirs['id']}/complete", headers=headers, json={"part_ids": ids})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "part_ids.0")
    assert client.uploads.complete(upload_id, part_ids=ids).status == "completed"
