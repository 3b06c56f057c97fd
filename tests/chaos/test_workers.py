"""Workers that lack something, can't read a job, or break every process that they start."""

import dataclasses
import errno
import http.server
import itertools
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import pytest
from sqlalchemy import func, text

from db.tables import Worker
from luthier.bases.catalogue import Catalogue
from luthier.core.errors import StorageRefusedError, UnavailableError
from luthier.core.settings import Settings
from luthier.core.specs import TrainingSpec
from luthier.storage.store import Storage
from services.capacity import workers
from tests.conftest import Api, wait_until
from tests.integration.training_script import Script, ScriptedChild
from tests.rows import colour_rows
from tests.training import Jobs, make_worker, train_next
from tests.workers import running_worker
from worker.app import sweep
from worker.context import WorkerContext, make_context
from worker.processes import work
from worker.tasks.prepare import prepare
from worker.tasks.train import claim, train


def _make_worker(settings: Settings, api: Api) -> WorkerContext:
    """Return a worker whose training processes are started one by one."""
    made = make_worker(settings, api)
    made.fork_server = None
    return made


@pytest.fixture
def context(settings: Settings, api: Api) -> WorkerContext:
    return _make_worker(settings, api)


@pytest.fixture
def other(settings: Settings, api: Api) -> WorkerContext:
    return _make_worker(settings, api)


def _change_spec(context: WorkerContext, job_id: str, statement: str) -> None:
    with context.database.transaction() as session:
        session.execute(text(f"UPDATE jobs SET spec = {statement} WHERE id = :id"), {"id": job_id})


@pytest.mark.parametrize(
    ("newer", "field"),
    [
        ("jsonb_set(spec, '{spec_version}', '2')", "spec_version"),
        ("jsonb_set(spec, '{training,sharpness}', '1')", "training.sharpness"),
    ],
    ids=["a later version", "a field of a later version"],
)
def test_a_specification_that_a_worker_can_not_read_costs_that_job_only(
    jobs: Jobs, context: WorkerContext, monkeypatch: pytest.MonkeyPatch, newer: str, field: str
) -> None:
    unchecked, queued, good = jobs.create(), jobs.prepared(), jobs.create()
    for job_id in (unchecked, queued):
        _change_spec(context, job_id, newer)
    trained: list[str] = []
    monkeypatch.setattr("worker.processes.train", lambda _, claimed: trained.append(claimed.lease.job_id))
    context.settings = context.settings.model_copy(update={"training_slots": 2})
    work(context)
    work(context)
    assert trained == [good]
    for job_id, status in ((unchecked, "validating_files"), (queued, "queued")):
        row = jobs.row(job_id)
        assert (row.status, row.lease_owner, row.num_crashes, row.error) == (status, None, 0, None)
        (found,) = [message for message in jobs.messages(job_id) if "newer worker" in message]
        assert field in found
    # A newer worker takes it: what it can read it runs.
    _change_spec(
        context, queued, "jsonb_set(spec - 'sharpness', '{spec_version}', '1') #- '{training,sharpness}'"
    )
    assert Jobs(jobs.client, make_context(context.settings)).claim().lease.job_id == queued


class _RefusingS3(http.server.BaseHTTPRequestHandler):
    """An S3 service that refuses its client everything."""

    code: ClassVar[int] = 403

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        body = b'<?xml version="1.0"?><Error><Code>Refused</Code><Message>no</Message></Error>'
        self.send_response(self.code)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(params=[403, 401, 301], ids=["no rights", "no credentials", "another region's bucket"])
def refusing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Storage]:
    """Storage that refuses what it is asked, by S3's own answers."""
    handler = type("Handler", (_RefusingS3,), {"code": request.param})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for name, value in {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_REGION": "us-east-1",
        }.items():
            monkeypatch.setenv(name, value)
        yield Storage.open("s3://bucket/prefix")
        server.shutdown()


def _try_until_the_end(jobs: Jobs, job_id: str) -> int:
    """Let a worker try a job, each time at once, until it has ended; return how often it did."""
    for tries in range(1, 20):
        prepare(jobs.context, job_id)
        assert not prepare(jobs.context, job_id), "tried again at once"
        if jobs.status(job_id) == "failed":
            return tries
        jobs.end_pause(job_id)
    pytest.fail("it is tried for ever")


def test_storage_that_refuses_fails_a_job_by_name_after_some_tries(jobs: Jobs, refusing: Storage) -> None:
    job_id = jobs.create()
    jobs.context.storage = refusing
    assert _try_until_the_end(jobs, job_id) <= 8
    assert jobs.error(job_id).code == "storage_refused"
    # One event for all tries, and one for the end.
    assert len([message for message in jobs.messages(job_id) if "refuses" in message]) == 2


def test_a_local_folder_that_is_none_fails_a_job_by_name(jobs: Jobs, tmp_path: Path) -> None:
    job_id = jobs.create()
    root = jobs.context.storage.local_root
    root.rename(tmp_path / "moved")
    root.write_text("a file where the folder was")
    _try_until_the_end(jobs, job_id)
    assert jobs.error(job_id).code == "storage_refused"


def _raise_away(*_: object, **__: object) -> None:
    raise UnavailableError("away")


def _fill_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_pauses_grow_and_progress_ends_them(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = jobs.create()
    pauses = []
    with monkeypatch.context() as broken:
        broken.setattr(jobs.context.storage, "fetch_file", _raise_away)
        for _ in range(6):
            prepare(jobs.context, job_id)
            with jobs.context.database.transaction() as session:
                left = text("SELECT extract(epoch FROM not_before - now()) FROM jobs WHERE id = :id")
                pauses.append(float(session.scalar(left, {"id": job_id})))
            assert jobs.row(job_id).num_crashes == 0
            jobs.end_pause(job_id)
    # Each is twice the one before, give or take a quarter.
    assert pauses[-1] > 8 * pauses[0]
    assert prepare(jobs.context, job_id)
    assert jobs.row(job_id).num_faults == 0


def test_a_full_disk_fails_a_job_by_name_after_tries(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = jobs.create()
    monkeypatch.setattr("worker.tasks.prepare.ensure_jobs_base", _fill_disk)
    assert _try_until_the_end(jobs, job_id) <= 8
    assert jobs.error(job_id).code == "storage_full"


@pytest.fixture
def failed_here(jobs: Jobs, context: WorkerContext, other: WorkerContext) -> str:
    """A job that met a full disk when it was to be trained here, while another worker lives."""
    job_id = jobs.prepared()
    with pytest.MonkeyPatch.context() as full:
        full.setattr("worker.tasks.train.start_child", _fill_disk)
        train(context, jobs.claim())
    jobs.end_pause(job_id)
    sweep(other)
    assert claim(context) is None
    return job_id


def test_a_worker_takes_a_job_that_failed_there_again_where_the_others_have_too_little_memory(
    jobs: Jobs, failed_here: str, other: WorkerContext
) -> None:
    other.device = dataclasses.replace(other.device, training_bytes=1, serving_bytes=0)
    sweep(other)
    assert claim(other) is None
    assert jobs.claim().lease.job_id == failed_here


def test_a_worker_takes_a_job_that_failed_there_after_some_minutes(jobs: Jobs, failed_here: str) -> None:
    jobs.change(failed_here, not_before=func.now() - timedelta(minutes=6))
    assert jobs.claim()


def test_a_fault_is_counted_further_though_its_words_change_and_the_job_waits_for_else_between(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = jobs.create()
    tries = itertools.count(1)

    def refuse(*_: object, **__: object) -> None:
        number = next(tries)
        with jobs.context.database.transaction() as session:
            workers.note_waiting(session, job_id, f"something else, try {number}")
        raise StorageRefusedError(f"Storage refuses request {number}.")

    monkeypatch.setattr("worker.tasks.prepare.ensure_jobs_base", refuse)
    assert _try_until_the_end(jobs, job_id) == 8
    # One event for all tries, and one for the end.
    assert len([message for message in jobs.messages(job_id) if "refuses" in message]) == 2


def test_a_job_waits_for_a_worker_that_has_its_base(jobs: Jobs, other: WorkerContext) -> None:
    unchecked, queued = jobs.create(), jobs.prepared()
    # The catalogues of both are changed: no worker has the base any more.
    full = jobs.context.catalogue
    for one in (jobs.context, other):
        one.catalogue = Catalogue(bases={}, aliases={})
        sweep(one)
        sweep(one)
        work(one)
    for job_id, status in ((unchecked, "validating_files"), (queued, "queued")):
        assert jobs.status(job_id) == status
        waiting = "The job waits for a worker that has the base model tiny-llama"
        assert jobs.messages(job_id).count(waiting) == 1
    other.catalogue = full
    assert Jobs(jobs.client, other).claim().lease.job_id == queued
    assert prepare(other, unchecked)


def test_a_job_that_was_prepared_for_other_weights_is_left_to_a_worker_that_has_them(
    jobs: Jobs, other: WorkerContext
) -> None:
    job_id = jobs.prepared()
    _change_spec(jobs.context, job_id, """jsonb_set(spec, '{base,digest}', '"sha256:other"')""")
    assert claim(jobs.context) is None
    assert (jobs.status(job_id), jobs.get(job_id).error) == ("queued", None)


def _let_die(context: WorkerContext, *, is_machine: bool = False) -> None:
    """Claim a job and have its training process die at once, by its own fault or its machine's."""
    with pytest.MonkeyPatch.context() as broken:
        claimed = claim(context)
        broken.setattr("sys.executable", "/bin/false")
        if not is_machine:
            broken.setattr("worker.quarantine.test_machine", lambda _: None)
        train(context, claimed)


def test_a_job_that_crashed_on_a_worker_is_anothers_while_one_lives(jobs: Jobs, other: WorkerContext) -> None:
    job_id = jobs.prepared()
    _let_die(jobs.context)
    assert claim(jobs.context) is None
    _let_die(other)
    row = jobs.row(job_id)
    assert (row.num_crashes, set(row.avoided_workers)) == (2, {jobs.context.worker_id, other.worker_id})
    jobs.end_pause(job_id)
    _let_die(jobs.context)
    assert jobs.error(job_id).code == "worker_crashed"


def test_no_worker_alone_fails_a_job_while_another_lives(jobs: Jobs, other: WorkerContext) -> None:
    job_id = jobs.prepared()
    jobs.change(job_id, num_crashes=7)
    _let_die(jobs.context)
    assert jobs.status(job_id) == "queued"


def test_a_machine_whose_worker_is_restarted_fails_no_job_while_another_lives(
    settings: Settings, api: Api, jobs: Jobs
) -> None:
    job_id, database = jobs.prepared(), jobs.context.database
    with database.transaction() as session:
        facts = {"bases": {"tiny-llama": None}}
        workers.beat(session, "elsewhere-1-0123abcd", hostname="elsewhere", num_slots=1, facts=facts)
    _let_die(jobs.context)
    for num_crashes in (2, 3):
        restarted = _make_worker(settings, api)
        jobs.end_pause(job_id)
        _let_die(restarted)
        with database.transaction() as session:
            workers.retire(session, restarted.worker_id)
        assert (jobs.row(job_id).num_crashes, jobs.status(job_id)) == (num_crashes, "queued")


@contextmanager
def _scripted_child(run_dir: Path, *_: object) -> Iterator[ScriptedChild]:
    """A training process that works, without the seconds of a real one."""
    spec = TrainingSpec.model_validate_json((run_dir / "spec.json").read_text())
    script = Script(run_dir.parent.name, spec, run_dir, steps_an_epoch=1, num_epochs=1)
    yield ScriptedChild(script.start().epoch(1, 2.0).finish(1).events)


def _assert_all_done_beside_a_broken_worker(jobs: Jobs, job_ids: list[str]) -> None:
    for job_id in job_ids:
        jobs.succeeded(job_id)
    messages = [message for job_id in job_ids for message in jobs.messages(job_id)]
    assert [message for message in messages if "claims nothing to train for" in message]
    assert "crashed" not in [outcome for job_id in job_ids for outcome in jobs.outcomes(job_id)]


def test_ten_jobs_beside_a_worker_that_can_run_no_process_all_succeed_on_the_other(
    jobs: Jobs, context: WorkerContext, other: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_ids = [jobs.prepared() for _ in range(10)]
    while {jobs.status(job_id) for job_id in job_ids} != {"succeeded"}:
        with monkeypatch.context() as broken:
            broken.setattr("sys.executable", "/bin/false")
            work(context)
        with monkeypatch.context() as well:
            well.setattr("worker.tasks.train.start_child", _scripted_child)
            train_next(other)
    _assert_all_done_beside_a_broken_worker(jobs, job_ids)


@pytest.mark.full
def test_a_worker_whose_processes_die_at_once_stops_and_the_queue_is_done_by_the_other(
    settings: Settings, jobs: Jobs, context: WorkerContext, tmp_path: Path
) -> None:
    job_ids = [jobs.prepared() for _ in range(10)]
    with context.database.transaction() as session:
        session.query(Worker).filter_by(id=context.worker_id).delete()
    patch = tmp_path / "patch"
    patch.mkdir()
    # In the processes that train, not in the one that starts these.
    (patch / "sitecustomize.py").write_text(
        'import sys\nif "--process" in sys.orig_argv:\n    sys.executable = "/bin/false"\n'
    )
    with running_worker(settings, tmp_path / "a.log", "--no-broker", PYTHONPATH=str(patch)) as broken:

        def quarantine() -> str | None:
            with context.database.transaction() as session:
                found = session.query(Worker.quarantine_reason).filter(Worker.quarantine_reason.is_not(None))
                return found.scalar()

        good = settings.model_copy(update={"warm_spare_seconds": 600})
        with running_worker(good, tmp_path / "b.log", "--no-broker"):
            wait_until(lambda: quarantine() is not None, seconds=120, what="the broken worker stops")
            assert "ends with exit code 1" in quarantine()
            wait_until(lambda: all(jobs.get(one).finished_at for one in job_ids), seconds=240, what="all end")
        assert broken.process.poll() is None
    _assert_all_done_beside_a_broken_worker(jobs, job_ids)


def test_a_worker_on_which_two_jobs_die_at_once_is_quarantined(jobs: Jobs, other: WorkerContext) -> None:
    job_ids = [jobs.prepared() for _ in range(3)]
    for _ in range(2):
        _let_die(jobs.context)
    assert claim(jobs.context) is None
    messages = [message for job_id in job_ids for message in jobs.messages(job_id)]
    died = "its last 2 training processes died at once"
    assert len([message for message in messages if died in message]) == 1
    assert claim(other) is not None


def test_a_worker_that_can_run_no_process_fails_no_job_and_tests_itself_before_it_claims_again(
    jobs: Jobs, context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, second = jobs.prepared(), jobs.prepared()
    _let_die(context, is_machine=True)
    assert claim(context) is None
    sweep(context)
    assert any("claims nothing to train for" in message for message in jobs.messages(job_id))
    assert any("a worker that can train: a training" in message for message in jobs.messages(second))

    def end_pauses() -> None:
        jobs.end_pause(job_id)
        with context.database.transaction() as session:
            session.execute(text("UPDATE workers SET quarantined_until = now() - interval '1 second'"))

    end_pauses()
    with monkeypatch.context() as broken:
        broken.setattr("sys.executable", "/bin/false")
        assert claim(context) is None
    with context.database.transaction() as session:
        worker = session.get_one(Worker, context.worker_id)
        assert "ends with exit code 1" in str(worker.quarantine_reason)
        assert worker.num_quarantines == 2
    assert jobs.row(job_id).num_crashes == 0
    end_pauses()
    assert jobs.claim().lease.job_id == job_id


@pytest.mark.full
def test_a_worker_that_stood_still_for_three_leases_changes_nothing(
    settings: Settings, jobs: Jobs, tmp_path: Path
) -> None:
    job_id = jobs.prepared(
        rows=colour_rows(40),
        hyperparameters={"n_epochs": 20, "batch_size": 1},
        training={"precision": "float32", "save_every_steps": 5},
    )
    short = settings.model_copy(update={"lease_seconds": 1.5})

    def has_gone_further(step: int) -> bool:
        row = jobs.row(job_id)
        return row.lease_epoch == 3 and row.step > step

    with running_worker(short, tmp_path / "a.log", "--no-broker") as first:
        wait_until(lambda: jobs.row(job_id).step > 5, seconds=90, what="it trains")
        first.signal_all(signal.SIGSTOP)
        stopped_at = jobs.row(job_id).step
        with running_worker(short, tmp_path / "b.log", "--no-broker"):
            wait_until(lambda: has_gone_further(stopped_at), seconds=90, what="taken")
            first.signal_all(signal.SIGCONT)
            wait_until(lambda: jobs.status(job_id) == "succeeded", seconds=120, what="it ends")
            time.sleep(1)
    assert jobs.outcomes(job_id) == ["prepared", "lost", "succeeded"]
    assert (jobs.row(job_id).num_crashes, jobs.status(job_id)) == (0, "succeeded")
    assert jobs.messages(job_id).count("The job has successfully completed") == 1


def test_quit_and_a_second_term_stop_a_worker(jobs: Jobs, settings: Settings, tmp_path: Path) -> None:
    job_id = jobs.prepared(hyperparameters={"n_epochs": 50, "batch_size": 1})
    with running_worker(settings, tmp_path / "a.log", "--no-broker") as worker:
        wait_until(lambda: any("Step" in m for m in jobs.messages(job_id)), seconds=90, what="steps")
        # A terminal sends QUIT to the worker and its processes; training has a group of its own.
        for number in (signal.SIGQUIT, signal.SIGTERM, signal.SIGTERM):
            worker.signal_own(number)
        assert worker.process.wait(timeout=60) == 0, worker.log()
    found = jobs.row(job_id)
    assert (found.num_crashes, found.num_losses, found.status) == (0, 0, "queued")
    assert any(message.startswith("The worker is stopping") for message in jobs.messages(job_id))
