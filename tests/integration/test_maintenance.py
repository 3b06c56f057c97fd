"""Maintenance goes past what it can't delete, leaves nothing over, and scans no table."""

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, func, select, text

from db.session import Database
from db.tables import Worker
from luthier.core.errors import UnavailableError
from luthier.core.ids import new_id
from luthier.core.settings import Settings
from services.accounts.auth import Principal
from services.capacity import workers
from services.files import files
from tests.conftest import Api, wait_until
from tests.training import Jobs
from tests.workers import running_worker
from worker.app import sweep
from worker.context import Watch, WorkerContext
from worker.maintenance import (
    collect_garbage,
    delete_orphans,
    remove_stale_runs,
    repeat,
    run_garbage_collection,
    take_lost_jobs,
)


@pytest.fixture
def deleted(api: Api, jobs: Jobs) -> Callable[[], Path]:
    """Delete a file whose bytes stay, and return where they are."""

    def delete() -> Path:
        file_id = jobs.upload()

        def away(*_: object) -> None:
            raise UnavailableError("away")

        with pytest.MonkeyPatch.context() as broken:
            broken.setattr(api.state.storage, "delete", away)
            jobs.client.files.delete(file_id)
        (path,) = api.state.storage.local_root.rglob(file_id)
        return path

    return delete


def _replace_by_folder(path: Path) -> None:
    """A folder can't be deleted as a file is."""
    path.unlink()
    (path / "below").mkdir(parents=True)


def _heartbeat(database: Database) -> float:
    with database.transaction() as session:
        return session.scalar(select(func.coalesce(func.extract("epoch", func.max(Worker.heartbeat_at)), 0)))


def test_what_can_not_be_deleted_is_skipped(deleted: Callable[[], Path], context: WorkerContext) -> None:
    first, second = deleted(), deleted()
    _replace_by_folder(first)
    collect_garbage(context, grace_seconds=0)
    assert first.exists()
    assert not second.exists()


def test_a_part_of_maintenance_that_breaks_is_done_again_and_stops_no_other(context: WorkerContext) -> None:
    context.settings = context.settings.model_copy(update={"sweep_seconds": 0.01})
    calls: list[str] = []

    def broken(_: WorkerContext) -> None:
        calls.append("broken")
        if len(calls) >= 3:
            context.stopping.set()
        raise ValueError("an unforeseen row")

    repeat(context, "test", broken)
    assert calls == ["broken"] * 3


def test_run_directories_that_no_attempt_holds_are_removed(jobs: Jobs, context: WorkerContext) -> None:
    job_id = jobs.prepared()
    runs, token = context.settings.runs_dir, jobs.claim().lease.fencing_token
    held, older = runs / job_id / f"e{token}", runs / job_id / f"e{token - 1}"
    unknown, another = runs / "ftjob-unknown" / "e3", runs / "notes" / "e3"
    for folder in (held, older, unknown, another):
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(b"x")
    remove_stale_runs(context)
    assert (held / "weights").exists()
    assert (another / "weights").exists()
    assert not older.exists()
    assert not unknown.parent.exists()


def test_the_run_directory_of_a_cancelled_job_is_removed_once_its_lease_is_over(jobs: Jobs) -> None:
    job_id = jobs.prepared()
    folder = jobs.context.settings.runs_dir / job_id / f"e{jobs.claim().lease.fencing_token}"
    folder.mkdir(parents=True)
    jobs.cancel(job_id)
    remove_stale_runs(jobs.context)
    # Its process may still be at work in it.
    assert folder.exists()
    jobs.change(job_id, lease_expires_at=func.now() - timedelta(seconds=1))
    remove_stale_runs(jobs.context)
    assert not folder.parent.exists()


def test_a_worker_that_sweeps_seldom_stays_alive_and_removes_run_directories_while_storage_is_away(
    api: Api, deleted: Callable[[], Path], settings: Settings, tmp_path: Path
) -> None:
    for _ in range(3):
        _replace_by_folder(deleted())
    stale = settings.runs_dir / "ftjob-unknown" / "e3"
    stale.mkdir(parents=True)
    database = api.state.database
    seldom = settings.model_copy(update={"sweep_seconds": 600})
    with running_worker(seldom, tmp_path / "worker.log", "--no-broker") as worker:
        wait_until(lambda: "garbage collection put off" in worker.log(), what="storage is asked")
        wait_until(lambda: not stale.exists(), seconds=10, what="the run directory is removed")
        first = _heartbeat(database)
        wait_until(lambda: _heartbeat(database) > first, seconds=15, what="the worker's next heartbeat")


def test_rows_of_workers_that_were_killed_are_deleted_after_a_day(context: WorkerContext) -> None:
    with context.database.transaction() as session:
        for worker_id in ("killed", "hidden"):
            workers.beat(session, worker_id, hostname="h", num_slots=1, facts={})
        for worker_id, hours in (("killed", 25), ("hidden", 1)):
            session.get_one(Worker, worker_id).heartbeat_at = func.now() - timedelta(hours=hours)
    context.watch = Watch(0.0)
    sweep(context)
    with context.database.transaction() as session:
        assert set(session.scalars(select(Worker.id))) == {"hidden", context.worker_id}


def test_objects_of_files_without_a_row_are_deleted_once_they_are_old(jobs: Jobs) -> None:
    (path,) = jobs.context.storage.local_root.rglob(jobs.upload())
    without_row, fresh = path.with_name(new_id("file")), path.with_name(new_id("file"))
    unfinished = path.with_name(f"{new_id('file')}#123456")
    for made in (without_row, fresh, unfinished):
        made.write_bytes(b"{}\n")
    day_ago = time.time() - jobs.context.settings.orphan_seconds - 1
    for old in (path, without_row, unfinished):
        os.utime(old, (day_ago, day_ago))
    delete_orphans(jobs.context)
    assert path.exists()
    assert fresh.exists()
    assert not without_row.exists()
    assert not unfinished.exists()


def test_a_sweep_waits_for_no_storage(deleted: Callable[[], Path], context: WorkerContext) -> None:
    deleted()
    hangs, may_end = threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        hangs.set()
        may_end.wait(30)

    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(context.storage, "delete", hang)
        collecting = threading.Thread(target=run_garbage_collection, args=(context,))
        collecting.start()
        assert hangs.wait(10)
        sweep(context)
        may_end.set()
        collecting.join(30)
    assert not collecting.is_alive()


def test_a_worker_is_alive_all_the_while_that_its_storage_hangs(
    api: Api, deleted: Callable[[], Path], settings: Settings, tmp_path: Path
) -> None:
    deleted()
    database = api.state.database
    # Connections are made, and nothing is ever answered.
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }
        hanging = settings.model_copy(update={"storage_url": "s3://bucket/prefix"})
        with running_worker(hanging, tmp_path / "worker.log", "--no-broker", **environment):
            connection, _ = silent.accept()
            with connection:
                asked_at = _heartbeat(database)
                wait_until(lambda: _heartbeat(database) > asked_at + 3, seconds=20, what="it is alive")


def _plans(context: WorkerContext, act: Any) -> list[str]:
    """Return PostgreSQL's plans of what is asked, with other ways than indexes made dear."""
    plans: list[str] = []

    def explain(connection: Any, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if statement.startswith(("SELECT", "UPDATE", "DELETE", "WITH")):
            with connection.connection.cursor() as own:
                own.execute("SET LOCAL enable_seqscan = off; SET LOCAL enable_sort = off")
                own.execute(f"EXPLAIN {statement}", parameters)
                plans.append("\n".join(row[0] for row in own.fetchall()))

    event.listen(context.database.engine, "before_cursor_execute", explain)
    try:
        act()
    finally:
        event.remove(context.database.engine, "before_cursor_execute", explain)
    return plans


def test_a_sweep_and_a_deleted_file_scan_no_table(jobs: Jobs, context: WorkerContext) -> None:
    """Not by the clock, which shows little with few rows: by what PostgreSQL says it will do."""
    plans = _plans(context, lambda: collect_garbage(context, grace_seconds=0))
    for index in ("ix_jobs_untidied", "ix_files_undeleted_bytes", "ix_models_undeleted_bytes"):
        assert any(index in plan for plan in plans), (index, plans)
    file_id = jobs.upload()
    plans += _plans(context, lambda: take_lost_jobs(context))
    with context.database.transaction() as session:
        row = session.execute(text("SELECT organization_id, project_id FROM files")).first()
    scope = Principal(row[0], "personal", row[1], None)

    def delete() -> None:
        with context.database.transaction() as session:
            files.delete(session, scope, file_id)

    plans += _plans(context, delete)
    scans = [line for plan in plans for line in plan.splitlines() if "Seq Scan on" in line]
    assert [line for line in scans if "jobs" in line or "files" in line or "models" in line] == []
