"""Pages of jobs, events and checkpoints: by keyset, each row once whatever is inserted meanwhile."""

from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from sqlalchemy import select, text

from db.tables import Checkpoint, Job, JobEvent
from luthier.core.ids import new_id
from luthier.core.specs import TrainingSpec
from services.accounts.auth import Principal
from services.jobs import events, jobs
from services.jobs.events import NewEvent
from services.models import models
from tests.conftest import Api
from tests.integration.training_script import BASE_FACTS
from tests.rows import colour_rows, jsonl

pytestmark = pytest.mark.shared_api
NUM_ROWS = 11


@pytest.fixture
def job_ids(api: Api) -> list[str]:
    """Eleven jobs, newest first, of which many were made in the same microsecond."""
    first = api.create_job(api.upload_file(jsonl(colour_rows())))["id"]
    with api.state.database.transaction() as session:
        for table in ("checkpoints", "models", "job_events"):
            session.execute(text(f"DELETE FROM {table} WHERE job_id <> :id"), {"id": first})
        session.execute(text("DELETE FROM jobs WHERE id <> :id"), {"id": first})
    for _ in range(NUM_ROWS - 1):
        _copy_job(api, first)
    return _newest_first(api)


def _newest_first(api: Api) -> list[str]:
    with api.state.database.transaction() as session:
        return list(session.scalars(select(Job.id).order_by(Job.created_at.desc(), Job.id.desc())))


def _copy_job(api: Api, job_id: str) -> None:
    """Make another job, of the same moment as the first."""
    columns = [column.name for column in Job.__table__.columns]
    values = ", ".join(":fresh" if name == "id" else name for name in columns)
    statement = f"INSERT INTO jobs ({', '.join(columns)}) SELECT {values} FROM jobs WHERE id = :id"
    with api.state.database.transaction() as session:
        session.execute(text(statement), {"fresh": new_id("job"), "id": job_id})


def _list(api: Api, path: str, **params: Any) -> httpx2.Response:
    return api.ask("GET", f"/fine_tuning/jobs{path}", params=params)


def _pages(api: Api, path: str, limit: int, between: Callable[[], object]) -> list[dict[str, Any]]:
    """Read a list to its end, and do something after every page."""
    found: list[dict[str, Any]] = []
    after: dict[str, str] = {}
    while True:
        page = _list(api, path, limit=limit, **after).json()
        assert page["object"] == "list"
        assert len(page["data"]) <= limit
        found += page["data"]
        if not page["has_more"]:
            return found
        after = {"after": page["data"][-1]["id"]}
        between()
        assert len(found) < 100, "the pages go round in circles"


def test_jobs_are_paged_whole_though_new_ones_come_meanwhile(api: Api, job_ids: list[str]) -> None:
    file_id = _list(api, "").json()["data"][0]["training_file"]
    for limit in (1, 3, NUM_ROWS - 1, NUM_ROWS, NUM_ROWS + 1):
        expected = _newest_first(api)

        def insert() -> None:
            api.create_job(file_id)

        assert [job["id"] for job in _pages(api, "", limit, insert)] == expected


def test_events_of_one_second_are_paged_whole_while_new_ones_come(api: Api, job_ids: list[str]) -> None:
    def report(number: int = 1) -> None:
        with api.state.database.transaction() as session:
            events.append(session, job_ids[0], [NewEvent(f"news {n}", data={}) for n in range(number)])

    report(NUM_ROWS)
    for limit in (1, 4, NUM_ROWS):
        with api.state.database.transaction() as session:
            rows = session.query(JobEvent).filter_by(job_id=job_ids[0]).order_by(JobEvent.seq.desc())
            expected = [row.id for row in rows]
        found = _pages(api, f"/{job_ids[0]}/events", limit, report)
        assert [event["id"] for event in found] == expected
        assert len({event["created_at"] for event in found}) < len(found)


def test_checkpoints_are_paged_whole_while_some_come_and_some_go(api: Api, job_ids: list[str]) -> None:
    with api.state.database.transaction() as session:
        for step in range(1, 8):
            _add_checkpoint(session, job_ids[0], step)
    next_step, num_retired = 100, 0

    def publish_and_retire() -> None:
        nonlocal next_step, num_retired
        next_step, num_retired = next_step + 1, num_retired + 1
        with api.state.database.transaction() as session:
            _add_checkpoint(session, job_ids[0], next_step)
            # Also the one that ended the page before.
            session.query(Checkpoint).filter(Checkpoint.step_number == 8 - 2 * num_retired).update(
                {"deleted_at": text("now()")}
            )

    found = _pages(api, f"/{job_ids[0]}/checkpoints", 2, publish_and_retire)
    steps = [checkpoint["step_number"] for checkpoint in found]
    assert steps == sorted(steps, reverse=True)
    assert steps == [7, 6, 5, 4, 3, 2, 1]


def _add_checkpoint(session: Any, job_id: str, step: int) -> None:
    job = session.get_one(Job, job_id)
    spec = TrainingSpec.model_validate(job.spec).model_copy(update={"base": BASE_FACTS})
    models.register(
        session,
        job,
        spec,
        name=f"ft:{job_id}:ckpt-step-{step}",
        kind="checkpoint",
        step=step,
        artifact_key=f"k{step}",
        artifact_digest="sha256:1",
        metrics={"step": step},
    )


def test_a_limit_of_0_is_an_empty_page_and_a_foreign_cursor_is_refused(api: Api, job_ids: list[str]) -> None:
    with api.state.database.transaction() as session:
        events.append(session, job_ids[0], [NewEvent("news", data={})])
        events.append(session, job_ids[1], [NewEvent("news", data={})])
        others = session.query(JobEvent.id).filter_by(job_id=job_ids[1]).limit(1).scalar()
    events_path, checkpoints_path = f"/{job_ids[0]}/events", f"/{job_ids[2]}/checkpoints"
    for path, is_filled in (("", True), (events_path, True), (checkpoints_path, False)):
        page = _list(api, path, limit=0).json()
        assert (page["data"], page["has_more"]) == ([], is_filled)
        for after in ("nothing", "", others, "file-1"):
            answer = _list(api, path, after=after)
            error = answer.json()["error"]
            assert (answer.status_code, error["param"], error["code"]) == (400, "after", "invalid_value")
        for limit in ("-1", "1001", "many"):
            answer = _list(api, path, limit=limit)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "limit")


def test_a_deep_page_begins_at_its_cursor_in_the_index(api: Api, job_ids: list[str]) -> None:
    """Not by the clock, which shows little with few rows: by what PostgreSQL says it will do."""
    with api.state.database.transaction() as session:
        job = session.get_one(Job, job_ids[5])
        scope = Principal(job.organization_id, "personal", job.project_id, None)
        seen: list[tuple[str, Any]] = []
        execute = session.scalars

        def explain(statement: Any) -> Any:
            compiled = statement.compile(session.get_bind())
            plan = session.connection().exec_driver_sql(f"EXPLAIN {compiled.string}", compiled.params)
            seen.append(("plan", "\n".join(row[0] for row in plan)))
            return execute(statement)

        session.execute(text("SET LOCAL enable_seqscan = off; SET LOCAL enable_bitmapscan = off"))
        session.execute(text("SET LOCAL enable_sort = off"))
        session.scalars = explain
        for is_plain in (False, True):
            rows, _ = jobs.list_(
                session, scope, after=job.id, limit=3, metadata=None, has_no_metadata=is_plain
            )
            assert [row.id for row in rows] == job_ids[6:9]
    for (_, plan), index in zip(seen, ("ix_jobs_page", "ix_jobs_page_plain"), strict=True):
        (condition,) = [line for line in plan.splitlines() if "ROW(" in line]
        assert f"Index Scan Backward using {index} on jobs" in plan
        assert condition.strip().startswith("Index Cond: "), plan


@pytest.mark.parametrize(
    ("path", "reported"),
    [
        ("fine_tuning/jobs?meta=x", "This URL takes after, limit, metadata."),
        ("fine_tuning/jobs?metadata[team=x", "This URL takes after, limit, metadata."),
        ("fine_tuning/jobs?limit=1&order=asc", "This URL takes after, limit, metadata."),
        ("fine_tuning/jobs/ftjob-1?limit=1", "This URL takes none."),
        ("files?purpos=fine-tune", "This URL takes "),
    ],
)
def test_a_query_parameter_that_a_url_does_not_have_is_refused(api: Api, path: str, reported: str) -> None:
    answer = api.ask("GET", f"/{path}")
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "unknown_parameter")
    assert reported in error["message"]


@pytest.mark.parametrize("path", ["fine_tuning/jobs?metadata[a]=b&limit=1", "fine_tuning/jobs?metadata=null"])
def test_the_metadata_filter_is_no_unknown_parameter(api: Api, path: str) -> None:
    assert api.ask("GET", f"/{path}").status_code == 200
