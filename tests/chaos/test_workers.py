"""Workers that lack something, can't read a job, or break every process that they start."""

import dataclasses
import errno
import http.server
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar

import openai
import pytest
from sqlalchemy import func, text

from db.tables import Attempt, Job, Worker
from luthier.bases.catalogue import Catalogue
from luthier.core.errors import StorageRefusedError, UnavailableError
from luthier.core.settings import Settings
from luthier.core.specs import TrainingSpec
from luthier.storage.store import Storage
from services.capacity import workers
from tests.conftest import Api, wait_until
from tests.integration.training_script import Script, ScriptedChild
from tests.rows import colour_rows, jsonl
from tests.training import create_short_job
from tests.workers import running_worker
from worker.app import sweep
from worker.context import WorkerContext, make_context
from worker.processes import work
from worker.tasks.prepare import prepare
from worker.tasks.train import claim, train


@pytest.fixture
def client(api: Api) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{api.base_url}/v1", api_key=api.key, max_retries=0)


def _make_context(settings: Settings, api: Api) -> WorkerContext:
    made = make_context(settings)
    made.notify = api.notified.append
    sweep(made)
    return made


@pytest.fixture
def context(settings: Settings, api: Api) -> Iterator[WorkerContext]:
    made = _make_context(settings, api)
    yield made
    made.database.close()


@pytest.fixture
def other(settings: Settings, api: Api) -> Iterator[WorkerContext]:
    made = _make_context(settings, api)
    yield made
    made.database.close()


def _messages(client: openai.OpenAI, job_id: str) -> list[str]:
    return [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100)][::-1]


def _end_pause(context: WorkerContext, job_id: str) -> None:
    """Let the time come at which a job that was put off is tried again."""
    with context.database.transaction() as session:
        session.get_one(Job, job_id).not_before = None


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
    client: openai.OpenAI, context: WorkerContext, monkeypatch: pytest.MonkeyPatch, newer: str, field: str
) -> None:
    unchecked, queued, good = create_short_job(client), create_short_job(client), create_short_job(client)
    prepare(context, queued)
    for job_id in (unchecked, queued):
        _change_spec(context, job_id, newer)
    trained: list[str] = []
    monkeypatch.setattr("worker.processes.train", lambda _, claimed: trained.append(claimed.lease.job_id))
    context.settings = context.settings.model_copy(update={"training_slots": 2})
    work(context)
    work(context)
    assert trained == [good]
    with context.database.transaction() as session:
        rows = [session.get_one(Job, job_id) for job_id in (unchecked, queued)]
        assert [(row.status, row.lease_owner, row.num_crashes, row.error) for row in rows] == [
            ("validating_files", None, 0, None),
            ("queued", None, 0, None),
        ]
    for job_id in (unchecked, queued):
        (found,) = [message for message in _messages(client, job_id) if "newer worker" in message]
        assert field in found
    # A newer worker takes it: what it can read it runs.
    _change_spec(
        context, queued, "jsonb_set(spec - 'sharpness', '{spec_version}', '1') #- '{training,sharpness}'"
    )
    newer_worker = make_context(context.settings)
    claimed = claim(newer_worker)
    newer_worker.database.close()
    assert claimed is not None
    assert claimed.lease.job_id == queued


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


def _try_until_the_end(client: openai.OpenAI, context: WorkerContext, job_id: str) -> int:
    """Let a worker try a job, each time at once, until it has ended; return how often it did."""
    for tries in range(1, 20):
        prepare(context, job_id)
        assert not prepare(context, job_id), "tried again at once"
        if client.fine_tuning.jobs.retrieve(job_id).status == "failed":
            return tries
        _end_pause(context, job_id)
    pytest.fail("it is tried for ever")


def test_storage_that_refuses_fails_a_job_by_name_after_a_handful_of_tries(
    client: openai.OpenAI, context: WorkerContext, refusing: Storage
) -> None:
    job_id = create_short_job(client)
    context.storage = refusing
    assert _try_until_the_end(client, context, job_id) <= 8
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert job.error is not None
    assert job.error.code == "storage_refused"
    # One event for all tries, and one for the end.
    assert len([message for message in _messages(client, job_id) if "refuses" in message]) == 2


def test_a_local_folder_that_is_none_fails_a_job_by_name(
    client: openai.OpenAI, context: WorkerContext, tmp_path: Path
) -> None:
    job_id = create_short_job(client)
    root = context.storage.local_root
    assert root is not None
    root.rename(tmp_path / "moved")
    root.write_text("a file where the folder was")
    _try_until_the_end(client, context, job_id)
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert job.error is not None
    assert job.error.code == "storage_refused"


def test_pauses_grow_and_progress_ends_them(client: openai.OpenAI, context: WorkerContext) -> None:
    job_id = create_short_job(client)
    fetch = context.storage.fetch_file
    context.storage.fetch_file = _raise_away  # type: ignore[method-assign]
    pauses = []
    for _ in range(6):
        prepare(context, job_id)
        with context.database.transaction() as session:
            left = session.scalar(
                text("SELECT extract(epoch FROM not_before - now()) FROM jobs WHERE id = :id"), {"id": job_id}
            )
            pauses.append(float(left))
            assert session.get_one(Job, job_id).num_crashes == 0
        _end_pause(context, job_id)
    # Each is twice the one before, give or take a quarter.
    assert pauses[-1] > 8 * pauses[0]
    context.storage.fetch_file = fetch  # type: ignore[method-assign]
    assert prepare(context, job_id)
    with context.database.transaction() as session:
        assert session.get_one(Job, job_id).num_faults == 0


def test_a_full_disk_of_a_worker_fails_a_job_by_name_after_some_tries(
    client: openai.OpenAI, context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = create_short_job(client)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("worker.tasks.prepare.ensure_jobs_base", full)
    assert _try_until_the_end(client, context, job_id) <= 8
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert job.error is not None
    assert job.error.code == "storage_full"


def _fail_on(context: WorkerContext, job_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prepare a job, and have it meet a full disk when it is to be trained."""
    prepare(context, job_id)
    with monkeypatch.context() as full:

        def fill(*_: object, **__: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        full.setattr("worker.tasks.train.start_child", fill)
        claimed = claim(context)
        assert claimed is not None
        train(context, claimed)
    _end_pause(context, job_id)


def test_a_worker_takes_a_job_that_failed_there_again_where_the_others_have_too_little_memory(
    client: openai.OpenAI, context: WorkerContext, other: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = create_short_job(client)
    _fail_on(context, job_id, monkeypatch)
    sweep(other)
    assert claim(context) is None
    assert other.device is not None
    other.device = dataclasses.replace(other.device, training_bytes=1, serving_bytes=0)
    sweep(other)
    assert claim(other) is None
    claimed = claim(context)
    assert claimed is not None
    assert claimed.lease.job_id == job_id


def test_a_worker_takes_a_job_that_failed_there_again_after_some_minutes(
    client: openai.OpenAI, context: WorkerContext, other: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = create_short_job(client)
    _fail_on(context, job_id, monkeypatch)
    sweep(other)
    assert claim(context) is None
    with context.database.transaction() as session:
        session.get_one(Job, job_id).not_before = func.now() - timedelta(minutes=6)
    assert claim(context) is not None


def test_a_fault_counts_on_though_its_words_change_and_the_job_waits_for_else_between(
    client: openai.OpenAI, context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = create_short_job(client)
    tries: list[int] = []

    def refuse(*_: object, **__: object) -> None:
        tries.append(len(tries))
        with context.database.transaction() as session:
            workers.note_waiting(session, job_id, f"something else, try {len(tries)}")
        raise StorageRefusedError(f"Storage refuses request {len(tries)}.")

    monkeypatch.setattr("worker.tasks.prepare.ensure_jobs_base", refuse)
    assert _try_until_the_end(client, context, job_id) == 8
    # One event for all tries, and one for the end.
    assert len([message for message in _messages(client, job_id) if "refuses" in message]) == 2


def _raise_away(*_: object, **__: object) -> None:
    raise UnavailableError("away")


def test_a_job_waits_for_a_worker_that_has_its_base(
    client: openai.OpenAI, context: WorkerContext, other: WorkerContext
) -> None:
    unchecked, queued = create_short_job(client), create_short_job(client)
    prepare(context, queued)
    # The catalogues of both are changed: no worker has the base any more.
    full = context.catalogue
    for one in (context, other):
        one.catalogue = Catalogue(bases={}, aliases={})
        sweep(one)
        sweep(one)
        work(one)
    for job_id, status in ((unchecked, "validating_files"), (queued, "queued")):
        assert client.fine_tuning.jobs.retrieve(job_id).status == status
        waiting = "The job waits for a worker that has the base model tiny-llama"
        assert _messages(client, job_id).count(waiting) == 1
    other.catalogue = full
    claimed = claim(other)
    assert claimed is not None
    assert claimed.lease.job_id == queued
    assert prepare(other, unchecked)


def test_a_job_that_was_prepared_for_other_weights_is_left_to_a_worker_that_has_them(
    client: openai.OpenAI, context: WorkerContext, other: WorkerContext
) -> None:
    job_id = create_short_job(client)
    prepare(context, job_id)
    _change_spec(context, job_id, """jsonb_set(spec, '{base,digest}', '"sha256:other"')""")
    assert claim(context) is None
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert (job.status, job.error) == ("queued", None)


def _let_die(context: WorkerContext, monkeypatch: pytest.MonkeyPatch, *, is_machine: bool = False) -> None:
    """Claim a job and have its training process die at once, by its own fault or its machine's."""
    with monkeypatch.context() as broken:
        claimed = claim(context)
        assert claimed is not None
        broken.setattr("sys.executable", "/bin/false")
        if not is_machine:
            broken.setattr("worker.quarantine.test_machine", lambda _: None)
        train(context, claimed)


def test_a_job_that_crashed_on_a_worker_is_anothers_while_one_lives(
    client: openai.OpenAI, context: WorkerContext, other: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = create_short_job(client)
    prepare(context, job_id)
    _let_die(context, monkeypatch)
    assert claim(context) is None
    _let_die(other, monkeypatch)
    with context.database.transaction() as session:
        row = session.get_one(Job, job_id)
        assert (row.num_crashes, set(row.avoided_workers)) == (2, {context.worker_id, other.worker_id})
    _end_pause(context, job_id)
    _let_die(context, monkeypatch)
    job = client.fine_tuning.jobs.retrieve(job_id)
    assert job.error is not None
    assert (job.status, job.error.code) == ("failed", "worker_crashed")


def test_no_worker_alone_fails_a_job_while_another_lives(
    client: openai.OpenAI, context: WorkerContext, other: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = create_short_job(client)
    prepare(context, job_id)
    with context.database.transaction() as session:
        session.get_one(Job, job_id).num_crashes = 7
    _let_die(context, monkeypatch)
    assert client.fine_tuning.jobs.retrieve(job_id).status == "queued"


def test_a_machine_whose_worker_is_restarted_fails_no_job_while_another_lives(
    settings: Settings,
    api: Api,
    client: openai.OpenAI,
    context: WorkerContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job_id = create_short_job(client)
    prepare(context, job_id)
    with context.database.transaction() as session:
        base = {"tiny-llama": None}
        workers.beat(
            session, "elsewhere-1-0123abcd", hostname="elsewhere", num_slots=1, facts={"bases": base}
        )
    _let_die(context, monkeypatch)
    for num_crashes in (2, 3):
        restarted = _make_context(settings, api)
        _end_pause(context, job_id)
        _let_die(restarted, monkeypatch)
        with context.database.transaction() as session:
            workers.retire(session, restarted.worker_id)
            row = session.get_one(Job, job_id)
            assert (row.num_crashes, row.status) == (num_crashes, "queued")
        restarted.database.close()


def _statuses(client: openai.OpenAI, jobs: list[str]) -> list[str]:
    return [client.fine_tuning.jobs.retrieve(job_id).status for job_id in jobs]


@contextmanager
def _scripted_child(run_dir: Path, *_: object) -> Iterator[ScriptedChild]:
    """A training process that works, without the seconds of a real one."""
    spec = TrainingSpec.model_validate_json((run_dir / "spec.json").read_text())
    script = Script(run_dir.parent.name, spec, run_dir, steps_an_epoch=1, num_epochs=1)
    yield ScriptedChild(script.start().epoch(1, 2.0).finish(1).events)


def test_ten_jobs_beside_a_worker_that_can_run_no_process_all_succeed_on_the_other(
    client: openai.OpenAI, context: WorkerContext, other: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [create_short_job(client) for _ in range(10)]
    for job_id in jobs:
        prepare(context, job_id)
    while set(_statuses(client, jobs)) != {"succeeded"}:
        with monkeypatch.context() as broken:
            broken.setattr("sys.executable", "/bin/false")
            work(context)
        with monkeypatch.context() as well:
            well.setattr("worker.tasks.train.start_child", _scripted_child)
            claimed = claim(other)
            if claimed is not None:
                train(other, claimed)
    messages = [message for job_id in jobs for message in _messages(client, job_id)]
    assert [message for message in messages if "claims nothing to train for" in message]
    with context.database.transaction() as session:
        assert session.query(Attempt).filter_by(outcome="crashed").count() == 0


@pytest.mark.full
def test_a_worker_whose_processes_die_at_once_stops_and_the_queue_is_done_by_the_other(
    settings: Settings, api: Api, client: openai.OpenAI, context: WorkerContext, tmp_path: Path
) -> None:
    jobs = [create_short_job(client) for _ in range(10)]
    for job_id in jobs:
        prepare(context, job_id)
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
            with api.state.database.transaction() as session:
                found = session.query(Worker.quarantine_reason).filter(Worker.quarantine_reason.is_not(None))
                return found.scalar()

        good = settings.model_copy(update={"warm_spare_seconds": 600})
        with running_worker(good, tmp_path / "b.log", "--no-broker"):
            wait_until(lambda: quarantine() is not None, seconds=120, what="the broken worker stops")
            reason = quarantine()
            wait_until(
                lambda: set(_statuses(client, jobs)) <= {"succeeded", "failed"}, seconds=240, what="all end"
            )
        assert broken.process.poll() is None
    assert reason is not None
    assert "ends with exit code 1" in reason
    assert _statuses(client, jobs) == ["succeeded"] * 10
    messages = [message for job_id in jobs for message in _messages(client, job_id)]
    assert [message for message in messages if "claims nothing to train for" in message]
    with api.state.database.transaction() as session:
        assert session.query(Attempt).filter_by(outcome="crashed").count() == 0


def test_a_worker_on_which_two_jobs_die_at_once_is_quarantined(
    client: openai.OpenAI, context: WorkerContext, other: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [create_short_job(client) for _ in range(3)]
    for job_id in jobs:
        prepare(context, job_id)
    for _ in range(2):
        _let_die(context, monkeypatch)
    assert claim(context) is None
    messages = [message for job_id in jobs for message in _messages(client, job_id)]
    assert (
        len([message for message in messages if "its last 2 training processes died at once" in message]) == 1
    )
    assert claim(other) is not None


def test_a_worker_that_can_run_no_process_fails_no_job_and_tests_itself_before_it_claims_again(
    client: openai.OpenAI, context: WorkerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, second = create_short_job(client), create_short_job(client)
    for each in (job_id, second):
        prepare(context, each)
    _let_die(context, monkeypatch, is_machine=True)
    assert claim(context) is None
    sweep(context)
    assert any("claims nothing to train for" in message for message in _messages(client, job_id))
    assert any("a worker that can train: a training" in message for message in _messages(client, second))

    def end_pauses() -> None:
        _end_pause(context, job_id)
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
        assert session.get_one(Job, job_id).num_crashes == 0
    end_pauses()
    claimed = claim(context)
    assert claimed is not None
    assert claimed.lease.job_id == job_id


@pytest.mark.full
def test_a_worker_that_stood_still_for_three_leases_changes_nothing(
    settings: Settings, client: openai.OpenAI, context: WorkerContext, tmp_path: Path
) -> None:
    file = client.files.create(file=("rows.jsonl", jsonl(colour_rows(40))), purpose="fine-tune")
    job_id = client.fine_tuning.jobs.create(
        model="tiny-llama",
        training_file=file.id,
        hyperparameters={"n_epochs": 20, "batch_size": 1},
        extra_body={"training": {"precision": "float32", "save_every_steps": 5}},
    ).id
    prepare(context, job_id)
    short = settings.model_copy(update={"lease_seconds": 1.5})

    def row() -> Job:
        with context.database.transaction() as session:
            return session.get_one(Job, job_id)

    with running_worker(short, tmp_path / "a.log", "--no-broker") as first:
        wait_until(lambda: row().step > 5, seconds=90, what="it trains")
        first.signal_all(signal.SIGSTOP)
        stopped_at = row().step
        with running_worker(short, tmp_path / "b.log", "--no-broker"):
            wait_until(lambda: row().lease_epoch == 3 and row().step > stopped_at, seconds=90, what="taken")
            first.signal_all(signal.SIGCONT)
            wait_until(lambda: row().status == "succeeded", seconds=120, what="it ends")
            time.sleep(1)
    with context.database.transaction() as session:
        found = session.query(Attempt).filter_by(job_id=job_id).order_by(Attempt.lease_epoch)
        assert [one.outcome for one in found] == ["prepared", "lost", "succeeded"]
        final = session.get_one(Job, job_id)
        assert (final.num_crashes, final.status) == (0, "succeeded")
    messages = _messages(client, job_id)
    assert messages.count("The job has successfully completed") == 1


def test_quit_and_a_second_term_stop_a_worker_as_the_first_does(
    client: openai.OpenAI, context: WorkerContext, settings: Settings, tmp_path: Path
) -> None:
    job_id = create_short_job(client, n_epochs=50, batch_size=1)
    prepare(context, job_id)
    with running_worker(settings, tmp_path / "a.log", "--no-broker") as worker:
        wait_until(lambda: client.fine_tuning.jobs.retrieve(job_id).status == "running", what="it is taken")
        wait_until(
            lambda: any("Step" in message for message in _messages(client, job_id)),
            seconds=90,
            what="steps",
        )
        # A terminal sends QUIT to the worker and its processes; training has a group of its own.
        for number in (signal.SIGQUIT, signal.SIGTERM, signal.SIGTERM):
            worker.signal_own(number)
        assert worker.process.wait(timeout=60) == 0, worker.log()
    with context.database.transaction() as session:
        found = session.get_one(Job, job_id)
        assert (found.num_crashes, found.num_losses, found.status) == (0, 0, "queued")
    assert any(message.startswith("The worker is stopping") for message in _messages(client, job_id))
