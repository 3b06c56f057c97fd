"""Pause and resume through API, database and worker; the training process is scripted, the rest is real."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import openai
import pytest
from sqlalchemy import text

from db.tables import Attempt as AttemptRow
from luthier.core.errors import JobError, UnavailableError, WorkerCrashedError
from luthier.core.events import FailedEvent
from services.jobs import leases
from services.jobs.leases import LeaseLostError
from tests.conftest import Api
from tests.integration.stoppable_child import Attempt
from tests.integration.training_script import Script
from tests.rows import colour_rows, jsonl
from tests.training import job_row
from worker.app import sweep
from worker.attempt import requeue
from worker.context import WorkerContext, make_context
from worker.maintenance import collect_garbage
from worker.tasks.prepare import prepare
from worker.training_process import event_buffer
from worker.training_process.supervisor import Ending


@pytest.fixture(scope="module")
def api(module_api: Api) -> Api:
    return module_api


@pytest.fixture
def client(api: Api) -> openai.OpenAI:
    # Not the strict one: the SDK's types lack `pausing` and `paused`.
    return openai.OpenAI(base_url=f"{api.base_url}/v1", api_key=api.key, max_retries=0)


@pytest.fixture
def context(api: Api) -> Iterator[WorkerContext]:
    """A worker; the jobs that a test leaves are ended with it."""
    made = make_context(api.state.settings.model_copy(update={"sweep_seconds": 0.01}))
    made.notify = api.notified.append
    sweep(made)
    yield made
    with made.database.transaction() as session:
        session.execute(
            text("UPDATE jobs SET status = 'cancelled', finished_at = now() WHERE finished_at IS NULL")
        )
    made.database.close()


@pytest.fixture
def create(client: openai.OpenAI, context: WorkerContext) -> Callable[[], str]:
    def make() -> str:
        file = client.files.create(file=("rows.jsonl", jsonl(colour_rows())), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model="tiny-llama", training_file=file.id, seed=1)
        prepare(context, job.id)
        return job.id

    return make


@pytest.fixture
def attempt(context: WorkerContext, tmp_path: Path) -> Callable[..., Attempt]:
    numbers = itertools.count()

    def begin(*arguments: Callable[[Script], object], step: int = 1) -> Attempt:
        first = arguments[0] if arguments else Script.start
        return Attempt(context, tmp_path / f"run-{next(numbers)}", first, *arguments[1:], step=step)

    return begin


def _outcomes(context: WorkerContext, job_id: str) -> list[str | None]:
    with context.database.transaction() as session:
        rows = session.query(AttemptRow).filter_by(job_id=job_id).order_by("lease_epoch")
        return [row.outcome for row in rows][1:]  # the first attempt prepared it


def _claim(context: WorkerContext, num_slots: int = 1) -> str | None:
    with context.database.transaction() as session:
        taken = leases.claim_for_training(session, context.worker_id, num_slots, 30)
        return None if taken is None else taken[0].job_id


def _messages(client: openai.OpenAI, job_id: str) -> list[str]:
    return [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100)][::-1]


def _assert_without_a_lease(context: WorkerContext, job_id: str, status: str) -> None:
    job = job_row(context, job_id)
    assert (job.status, job.lease_owner, job.lease_expires_at) == (status, None, None)
    assert (job.estimated_finish_at, job.finished_at, job.error) == (None, None, None)


def test_a_queued_job_is_paused_at_once_and_not_taken_until_it_is_resumed(
    api: Api, client: openai.OpenAI, context: WorkerContext, create: Callable[[], str]
) -> None:
    job_id = create()
    assert client.fine_tuning.jobs.pause(job_id).status == "paused"
    _assert_without_a_lease(context, job_id, "paused")
    assert _claim(context) is None
    sweep(context)
    with pytest.raises(openai.BadRequestError) as in_use:
        client.files.delete(client.fine_tuning.jobs.retrieve(job_id).training_file)
    assert in_use.value.code == "file_in_use"
    api.notified.clear()
    assert client.fine_tuning.jobs.resume(job_id).status == "queued"
    assert api.notified == [job_id]
    assert _messages(client, job_id)[-2:] == ["The job was paused at its beginning", "The job was resumed"]
    assert _claim(context) == job_id


def test_a_running_job_is_paused_at_a_save_point_and_gives_its_slot_back(
    client: openai.OpenAI, context: WorkerContext, create: Callable[[], str], attempt: Callable[..., Attempt]
) -> None:
    job_id, other = create(), create()
    run = attempt(lambda script: script.start().epoch(1, 5.0), step=2)
    run.child.may_end.clear()
    assert client.fine_tuning.jobs.pause(job_id).status == "pausing"
    assert run.child.is_asked.wait(5), "the training process was not asked to stop"
    # It still has its slot: the process is not gone yet.
    assert _claim(context) is None
    run.child.may_end.set()
    assert run.join() is Ending.PAUSED
    _assert_without_a_lease(context, job_id, "paused")
    assert _outcomes(context, job_id) == ["paused"]
    assert job_row(context, job_id).num_crashes == 0
    assert "The job is pausing" in _messages(client, job_id)
    assert _messages(client, job_id)[-1] == "The job was paused at step 2"
    assert _claim(context) == other

    kept = job_row(context, job_id).save_points
    collect_garbage(context, grace_seconds=0)
    assert [point["step"] for point in kept] == [2]
    assert context.storage.read_manifest(kept[0]["key"]).files
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job_id)
    assert [checkpoint.step_number for checkpoint in checkpoints] == [1]
    client.fine_tuning.jobs.resume(job_id)
    assert _claim(context, num_slots=2) == job_id


def test_a_job_resumed_while_it_is_pausing_waits_for_its_save_point_and_loses_nothing(
    client: openai.OpenAI,
    context: WorkerContext,
    create: Callable[[], str],
    attempt: Callable[..., Attempt],
) -> None:
    job_id = create()
    run = attempt(step=2)
    run.child.may_end.clear()
    client.fine_tuning.jobs.pause(job_id)
    assert client.fine_tuning.jobs.resume(job_id).status == "queued"
    other = make_context(context.settings)
    assert _claim(other) is None, "taken while its first attempt was still saving"
    assert _claim(context) is None
    sweep(other)
    assert run.child.is_asked.wait(5)
    run.child.may_end.set()
    assert run.join() is Ending.REQUEUED
    _assert_without_a_lease(context, job_id, "queued")
    # Between them may be what its first attempt had not reported yet.
    reported = _messages(client, job_id)
    assert reported.index("The job is pausing") < reported.index("The job was resumed")
    assert reported[-1] == "The job waits for a worker at step 2"
    assert [point["step"] for point in job_row(context, job_id).save_points] == [2]
    assert _claim(other) == job_id
    other.database.close()


def test_a_job_paused_again_while_its_attempt_still_stops_is_without_a_lease(
    client: openai.OpenAI, context: WorkerContext, create: Callable[[], str], attempt: Callable[..., Attempt]
) -> None:
    job_id = create()
    run = attempt()
    run.child.may_end.clear()
    client.fine_tuning.jobs.pause(job_id)
    client.fine_tuning.jobs.resume(job_id)
    assert client.fine_tuning.jobs.pause(job_id).status == "paused"
    assert run.join() is None
    assert isinstance(run.fault, LeaseLostError)
    _assert_without_a_lease(context, job_id, "paused")
    assert _outcomes(context, job_id) == ["paused"]


@pytest.mark.parametrize("is_resumed", [False, True], ids=["pausing", "resumed while pausing"])
def test_a_job_that_comes_to_its_end_while_it_is_pausing_has_ended(
    is_resumed: bool,
    client: openai.OpenAI,
    create: Callable[[], str],
    attempt: Callable[..., Attempt],
) -> None:
    def succeed(script: Script) -> None:
        script.epoch(2, 4.0)
        script.epoch(3, 3.0)
        script.finish(3)

    def fail(script: Script) -> None:
        script.events.append(FailedEvent(job_id=script.job_id, code="non_finite_loss", message="no number"))

    for write, status in ((succeed, "succeeded"), (fail, "failed")):
        job_id = create()
        run = attempt(lambda script: script.start().epoch(1, 5.0), write)
        run.child.may_end.clear()
        client.fine_tuning.jobs.pause(job_id)
        assert run.child.is_asked.wait(5)
        if is_resumed:
            client.fine_tuning.jobs.resume(job_id)
        run.child.may_end.set()
        if write is fail:
            assert run.join() is None
            assert isinstance(run.fault, JobError)
            _fail(run)
        else:
            assert run.join() is Ending.SUCCEEDED
        assert client.fine_tuning.jobs.retrieve(job_id).status == status


def _fail(run: Attempt) -> None:
    """Write a failure as worker.tasks.train does."""
    assert isinstance(run.fault, JobError)
    with run.context.database.transaction() as session:
        leases.fail(session, run.lease, run.fault)


@pytest.mark.parametrize(
    ("verbs", "status"), [(["pause"], "paused"), (["pause", "resume"], "queued")], ids=["paused", "resumed"]
)
def test_a_pausing_job_whose_worker_is_lost_keeps_its_place_and_that_is_no_crash(
    verbs: list[str],
    status: str,
    client: openai.OpenAI,
    context: WorkerContext,
    create: Callable[[], str],
) -> None:
    job_id = create()
    for _ in range(context.settings.max_attempts + 1):
        assert _claim(context) == job_id
        for verb in verbs:
            getattr(client.fine_tuning.jobs, verb)(job_id)
        with context.database.transaction() as session:
            assert leases.sweep(session) == []
            late = "UPDATE jobs SET lease_expires_at = now() - interval '1 second' WHERE id = :id"
            session.execute(text(late), {"id": job_id})
        with context.database.transaction() as session:
            assert leases.sweep(session) == [job_id]
        _assert_without_a_lease(context, job_id, status)
        if status == "paused":
            client.fine_tuning.jobs.resume(job_id)
    assert job_row(context, job_id).num_crashes == 0
    assert set(_outcomes(context, job_id)) == {"stopped"}


def test_an_attempt_that_breaks_off_or_lacks_a_part_while_pausing_leaves_the_job_paused(
    client: openai.OpenAI, context: WorkerContext, create: Callable[[], str]
) -> None:
    job_id = create()
    for outcome in ("stopped", "unavailable"):
        with context.database.transaction() as session:
            taken = leases.claim_for_training(session, context.worker_id, 1, 30)
        assert taken is not None
        client.fine_tuning.jobs.pause(job_id)
        if outcome == "stopped":
            with context.database.transaction() as session:
                leases.retry_or_fail(session, taken[0], WorkerCrashedError("Gone."), max_attempts=1)
        else:
            requeue(context, taken[0], UnavailableError("Storage is away."))
        _assert_without_a_lease(context, job_id, "paused")
        assert _outcomes(context, job_id)[-1] == outcome
        client.fine_tuning.jobs.resume(job_id)
    messages = _messages(client, job_id)
    assert "Gone. The job is paused at its beginning." in messages
    assert "The job waits: Storage is away." in messages


def test_a_worker_that_stops_leaves_a_pausing_job_paused(
    client: openai.OpenAI, context: WorkerContext, create: Callable[[], str], attempt: Callable[..., Attempt]
) -> None:
    job_id = create()
    # Asked to stop before its first step, the process ends without a word.
    run = attempt(Script.start, lambda script: script)
    run.child.may_end.clear()
    client.fine_tuning.jobs.pause(job_id)
    context.stopping.set()
    run.child.may_end.set()
    assert run.join() is Ending.PAUSED
    _assert_without_a_lease(context, job_id, "paused")
    assert _outcomes(context, job_id) == ["paused"]


def test_storage_that_is_away_at_the_last_save_point_is_waited_for(
    client: openai.OpenAI,
    context: WorkerContext,
    create: Callable[[], str],
    attempt: Callable[..., Attempt],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job_id = create()
    run = attempt(step=2)
    put, num_tries = context.storage.put_folder, 0

    def away_twice(folder: Path, key: str) -> object:
        nonlocal num_tries
        num_tries += 1
        if num_tries <= 2:
            raise UnavailableError("away")
        return put(folder, key)

    monkeypatch.setattr(context.storage, "put_folder", away_twice)
    monkeypatch.setattr(event_buffer, "_PAUSES_SECONDS", (0.01, 0.01))
    client.fine_tuning.jobs.pause(job_id)
    assert run.join() is Ending.PAUSED
    assert [point["step"] for point in job_row(context, job_id).save_points] == [2]


def test_what_cannot_be_paused_or_resumed_is_400_and_names_the_status(
    client: openai.OpenAI, create: Callable[[], str]
) -> None:
    file = client.files.create(file=("rows.jsonl", jsonl(colour_rows())), purpose="fine-tune")
    unprepared = client.fine_tuning.jobs.create(model="tiny-llama", training_file=file.id).id
    job_id = create()
    jobs = client.fine_tuning.jobs

    def refused(act: Callable[[str], object], whose: str, *words: str) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            act(whose)
        assert caught.value.code == "invalid_job_state"
        assert all(word in str(caught.value) for word in words), str(caught.value)

    refused(jobs.pause, unprepared, "validating_files", "once it is queued or running")
    refused(jobs.resume, unprepared, "validating_files", "only a paused job")
    refused(jobs.resume, job_id, "queued")
    jobs.pause(job_id)
    refused(jobs.pause, job_id, "paused already")
    assert jobs.cancel(job_id).status == "cancelled"
    for act in (jobs.pause, jobs.resume, jobs.cancel):
        refused(act, job_id, "ended with status cancelled")
    for act in (jobs.pause, jobs.resume):
        with pytest.raises(openai.NotFoundError):
            act("ftjob-nothing")


def test_a_verb_sent_again_because_its_answer_was_lost_is_no_fault_and_does_nothing_twice(
    api: Api, client: openai.OpenAI, context: WorkerContext, create: Callable[[], str]
) -> None:
    job_id = create()

    def post(verb: str, **headers: str) -> httpx2.Response:
        url = f"{api.base_url}/v1/fine_tuning/jobs/{job_id}/{verb}"
        return httpx2.post(url, headers=api.headers | headers)

    again = {"X-Stainless-Retry-Count": "1"}
    assert post("resume", **again).status_code == 400, "never done, so no repeat of anything"
    for verb, status in (("pause", "paused"), ("resume", "queued"), ("pause", "paused")):
        assert post(verb).json()["status"] == status
        num_events = job_row(context, job_id).last_event_seq
        answer = post(verb, **again)
        assert (answer.status_code, answer.json()["status"]) == (200, status)
        assert post(verb).status_code == 400
        assert job_row(context, job_id).last_event_seq == num_events
    # A repeat that finds its act undone by another does it: it may never have arrived before.
    client.fine_tuning.jobs.resume(job_id)
    assert post("pause", **again).json()["status"] == "paused"
    # What has gone on meanwhile is no fault either.
    post("resume")
    assert _claim(context) == job_id
    assert post("resume", **again).json()["status"] == "running"
    assert post("cancel", **{"Idempotency-Key": "k"}).json()["status"] == "cancelled"
    assert post("cancel", **{"Idempotency-Key": "k"}).json()["status"] == "cancelled"
    assert post("cancel", **again).status_code == 400
