"""Limits of a project: refusals name limit, use and what to do, and concern no other project."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import openai
import pytest
from sqlalchemy import event, func, select, text, update

from db.tables import IdempotencyKey
from luthier.core.settings import Settings
from tests.conftest import Api
from tests.rows import colour_rows, jsonl
from worker.context import WorkerContext
from worker.maintenance import collect_garbage

ROWS = jsonl(colour_rows())


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(
        update={
            "max_queued_jobs_per_project": 2,
            "max_running_uploads_per_project": 2,
            "max_stored_bytes_per_project": 3 * len(ROWS),
        }
    )


@pytest.fixture
def other(api: Api, client: openai.OpenAI) -> Iterator[openai.OpenAI]:
    """A client of another project."""
    with client.with_options(api_key=api.make_key()["key"]) as made:
        yield made


def _upload(client: openai.OpenAI) -> str:
    return client.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id


def _job(client: openai.OpenAI, file_id: str, **more: str) -> str:
    return client.fine_tuning.jobs.create(model="tiny-llama", training_file=file_id, **more).id


def test_no_more_jobs_wait_than_may_though_twins_come(client: openai.OpenAI, other: openai.OpenAI) -> None:
    file_id = _upload(client)

    def create(number: int) -> str:
        try:
            return _job(client, file_id, suffix=f"twin-{number}")
        except openai.RateLimitError as error:
            return error.message

    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(create, range(6)))
    made = [answer for answer in answers if answer.startswith("ftjob-")]
    assert len(made) == 2
    [refusal] = set(answers) - set(made)
    assert "2 jobs" in refusal
    assert "limit is 2" in refusal
    assert "LUTHIER_MAX_QUEUED_JOBS_PER_PROJECT" in refusal
    assert _job(other, _upload(other)).startswith("ftjob-")
    client.fine_tuning.jobs.cancel(made[0])
    assert _job(client, file_id).startswith("ftjob-")


def test_waiting_jobs_are_counted_without_a_visit_to_each_job(api: Api, client: openai.OpenAI) -> None:
    file_id = _upload(client)
    first = _job(client, file_id)
    seen: list[tuple[str, Any]] = []

    def keep(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "count(*)" in statement and "jobs.project_id" in statement:
            seen.append((statement, parameters))

    with api.state.database.transaction() as session:
        engine = session.get_bind().engine
        session.execute(
            text(
                "INSERT INTO jobs SELECT (jsonb_populate_record(j, jsonb_build_object('id', 'ftjob-' || n, "
                "'status', 'succeeded'))).* FROM jobs j, generate_series(1, 2000) n WHERE j.id = :id"
            ),
            {"id": first},
        )
    event.listen(engine, "before_cursor_execute", keep)
    try:
        _job(client, file_id)
    finally:
        event.remove(engine, "before_cursor_execute", keep)
    [(statement, parameters)] = seen
    with api.state.database.transaction() as session:
        session.execute(text("ANALYZE jobs"))
        # The plan of a statement that was prepared once for all parameters, as after its fifth use.
        session.execute(text("SET LOCAL plan_cache_mode = force_generic_plan"))
        rows = session.connection().exec_driver_sql(f"EXPLAIN {statement}", parameters)
        plan = "\n".join(row[0] for row in rows)
    assert "ix_jobs_waiting" in plan, plan


def test_no_more_uploads_are_open_than_may(client: openai.OpenAI, other: openai.OpenAI) -> None:
    def create(of: openai.OpenAI) -> str:
        return of.uploads.create(
            bytes=len(ROWS), filename="rows.jsonl", mime_type="text/jsonl", purpose="fine-tune"
        ).id

    first, _ = create(client), create(client)
    with pytest.raises(openai.RateLimitError, match="limit is 2") as caught:
        create(client)
    assert caught.value.response.headers["retry-after"]
    assert create(other)
    client.uploads.cancel(first)
    assert create(client)


def test_no_more_bytes_are_stored_than_may_and_nothing_of_a_refused_file_is_kept(
    api: Api, client: openai.OpenAI, other: openai.OpenAI
) -> None:
    files = [_upload(client) for _ in range(3)]
    before = api.stored_objects()
    with pytest.raises(openai.APIStatusError) as caught:
        _upload(client)
    assert caught.value.status_code == 413
    assert f"limit is {3 * len(ROWS)}" in caught.value.message
    assert f"{3 * len(ROWS)} bytes" in caught.value.message
    assert api.stored_objects() == before
    assert _upload(other)
    client.files.delete(files[0])
    assert _upload(client)


def test_an_upload_to_a_nearly_full_disk_is_refused_for_good(api: Api, client: openai.OpenAI) -> None:
    settings = api.state.settings
    object.__setattr__(api.state, "settings", settings.model_copy(update={"min_free_bytes": 10**18}))
    with pytest.raises(openai.InternalServerError) as caught:
        _upload(client)
    assert caught.value.status_code == 507
    assert caught.value.code == "storage_full"
    assert caught.value.response.headers["x-should-retry"] == "false"
    assert "LUTHIER_MIN_FREE_BYTES" in caught.value.message
    assert api.stored_objects() == []


def test_idempotency_keys_are_deleted_after_a_day(
    api: Api, client: openai.OpenAI, context: WorkerContext
) -> None:
    file_id = _upload(client)
    for key in ("old", "new"):
        client.fine_tuning.jobs.create(
            model="tiny-llama", training_file=file_id, extra_headers={"Idempotency-Key": key}
        )
    with api.state.database.transaction() as session:
        session.execute(
            update(IdempotencyKey)
            .where(IdempotencyKey.key == "old")
            .values(created_at=func.now() - timedelta(hours=25))
        )
    collect_garbage(context, grace_seconds=3600)
    with api.state.database.transaction() as session:
        assert list(session.scalars(select(IdempotencyKey.key))) == ["new"]
