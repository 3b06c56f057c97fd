"""Pause and resume through API, database and worker; the training process is scripted, the rest is real."""

import itertools
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import httpx2
import openai
import pytest
from sqlalchemy import func, text

from luthier.core.errors import JobError, UnavailableError, WorkerCrashedError
from luthier.core.events import FailedEvent
from services.jobs import leases
from services.jobs.leases import LeaseLostError
from tests.conftest import Api
from tests.integration.stoppable_child import Attempt
from tests.integration.training_script import Script
from tests.training import Jobs
from worker.app import sweep
from worker.attempt import requeue
from worker.context import WorkerContext, make_context
from worker.maintenance import collect_garbage
from worker.training_process import event_buffer
from worker.training_process.supervisor import Ending

pytestmark = pytest.mark.shared_api
# Begins an attempt: what its process says at once, and what once it is asked to stop.
Begin = Callable[..., Attempt]


@pytest.fixture
def client(api: Api) -> openai.OpenAI:
    # Not the strict one: the SDK's types lack `pausing` and `paused`.
    return api.client(is_strict=False)


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
def attempt(context: WorkerContext, tmp_path: Path) -> Begin:
    numbers = itertools.count()

    def begin(*arguments: Callable[[Script], object], step: int = 1) -> Attempt:
        first = arguments[0] if arguments else Script.start
        return Attempt(context, tmp_path / f"run-{next(numbers)}", first, *arguments[1:], step=step)

    return begin


def _claim(context: WorkerContext, num_slots: int = 1) -> str | None:
    with context.database.transaction() as session:
        taken = leases.claim_for_training(session, context.worker_id, num_slots, 30)
        return None if taken is None else taken[0].job_id


def _assert_without_a_lease(jobs: Jobs, job_id: str, status: str) -> None:
    job = jobs.row(job_id)
    assert (job.status, job.lease_owner, job.lease_expires_at) == (status, None, None)
    assert (job.estimated_finish_at, job.finished_at, job.error) == (None, None, None)


def test_a_queued_job_is_paused_at_once_and_not_taken_until_it_is_resumed(
    api: Api, client: openai.OpenAI, context: WorkerContext, jobs: Jobs
) -> None:
    job_id = jobs.prepared()
    assert jobs.pause(job_id) == "paused"
    _assert_without_a_lease(jobs, job_id, "paused")
    assert _claim(context) is None
    sweep(context)
    with pytest.raises(openai.BadRequestError) as in_use:
        client.files.delete(jobs.get(job_id).training_file)
    assert in_use.value.code == "file_in_use"
    api.notified.clear()
    assert jobs.resume(job_id) == "queued"
    assert api.notified == [job_id]
    assert jobs.messages(job_id)[-2:] == ["The job was paused at its beginning", "The job was resumed"]
    assert _claim(context) == job_id


def test_a_running_job_is_paused_at_a_save_point_and_gives_its_slot_back(jobs: Jobs, attempt: Begin) -> None:
    job_id, other = jobs.prepared(), jobs.prepared()
    run = attempt(lambda script: script.start().epoch(1, 5.0), step=2)
    run.child.may_end.clear()
    assert jobs.pause(job_id) == "pausing"
    assert run.child.is_asked.wait(5), "the training process was not asked to stop"
    # It still has its slot: the process is not gone yet.
    assert _claim(jobs.context) is None
    run.child.may_end.set()
    assert run.join() is Ending.PAUSED
    _assert_without_a_lease(jobs, job_id, "paused")
    assert jobs.outcomes(job_id) == ["prepared", "paused"]
    assert jobs.row(job_id).num_crashes == 0
    assert "The job is pausing" in jobs.messages(job_id)
    assert jobs.messages(job_id)[-1] == "The job was paused at step 2"
    assert _claim(jobs.context) == other

    kept = jobs.row(job_id).save_points
    collect_garbage(jobs.context, grace_seconds=0)
    assert [point["step"] for point in kept] == [2]
    assert jobs.context.storage.read_manifest(kept[0]["key"]).files
    assert list(jobs.checkpoints(job_id)) == [1]
    jobs.resume(job_id)
    assert _claim(jobs.context, num_slots=2) == job_id


def test_a_job_resumed_while_it_is_pausing_waits_for_its_save_point_and_loses_nothing(
    context: WorkerContext, jobs: Jobs, attempt: Begin
) -> None:
    job_id = jobs.prepared()
    run = attempt(step=2)
    run.child.may_end.clear()
    jobs.pause(job_id)
    assert jobs.resume(job_id) == "queued"
    other = make_context(context.settings)
    assert _claim(other) is None, "taken while its first attempt was still saving"
    assert _claim(context) is None
    sweep(other)
    assert run.child.is_asked.wait(5)
    run.child.may_end.set()
    assert run.join() is Ending.REQUEUED
    _assert_without_a_lease(jobs, job_id, "queued")
    # Between them may be what its first attempt had not reported yet.
    reported = jobs.messages(job_id)
    assert reported.index("The job is pausing") < reported.index("The job was resumed")
    assert reported[-1] == "The job waits for a worker at step 2"
    assert [point["step"] for point in jobs.row(job_id).save_points] == [2]
    assert _claim(other) == job_id


def test_a_job_paused_again_while_its_attempt_still_stops_is_without_a_lease(
    jobs: Jobs, attempt: Begin
) -> None:
    job_id = jobs.prepared()
    run = attempt()
    run.child.may_end.clear()
    jobs.pause(job_id)
    jobs.resume(job_id)
    assert jobs.pause(job_id) == "paused"
    assert run.join() is None
    assert isinstance(run.fault, LeaseLostError)
    _assert_without_a_lease(jobs, job_id, "paused")
    assert jobs.outcomes(job_id) == ["prepared", "paused"]


@pytest.mark.parametrize("is_resumed", [False, True], ids=["pausing", "resumed while pausing"])
def test_a_job_that_comes_to_its_end_while_it_is_pausing_has_ended(
    is_resumed: bool, jobs: Jobs, attempt: Begin
) -> None:
    def succeed(script: Script) -> None:
        script.epoch(2, 4.0)
        script.epoch(3, 3.0)
        script.finish(3)

    def fail(script: Script) -> None:
        script.events.append(FailedEvent(job_id=script.job_id, code="non_finite_loss", message="no number"))

    for write, status in ((succeed, "succeeded"), (fail, "failed")):
        job_id = jobs.prepared()
        run = attempt(lambda script: script.start().epoch(1, 5.0), write)
        run.child.may_end.clear()
        jobs.pause(job_id)
        assert run.child.is_asked.wait(5)
        if is_resumed:
            jobs.resume(job_id)
        run.child.may_end.set()
        if write is fail:
            assert run.join() is None
            assert isinstance(run.fault, JobError)
            # As worker.tasks.train does.
            with run.context.database.transaction() as session:
                leases.fail(session, run.lease, run.fault)
        else:
            assert run.join() is Ending.SUCCEEDED
        assert jobs.status(job_id) == status


@pytest.mark.parametrize(
    ("verbs", "status"), [(["pause"], "paused"), (["pause", "resume"], "queued")], ids=["paused", "resumed"]
)
def test_a_pausing_job_whose_worker_is_lost_keeps_its_place_and_that_is_no_crash(
    verbs: list[str], status: str, context: WorkerContext, jobs: Jobs
) -> None:
    job_id = jobs.prepared()
    for _ in range(context.settings.max_attempts + 1):
        assert _claim(context) == job_id
        for verb in verbs:
            getattr(jobs, verb)(job_id)
        with context.database.transaction() as session:
            assert leases.sweep(session) == []
        jobs.change(job_id, lease_expires_at=func.now() - timedelta(seconds=1))
        with context.database.transaction() as session:
            assert leases.sweep(session) == [job_id]
        _assert_without_a_lease(jobs, job_id, status)
        if status == "paused":
            jobs.resume(job_id)
    assert jobs.row(job_id).num_crashes == 0
    assert set(jobs.outcomes(job_id)[1:]) == {"stopped"}


def test_an_attempt_that_breaks_off_or_lacks_a_part_while_pausing_leaves_the_job_paused(jobs: Jobs) -> None:
    job_id = jobs.prepared()
    for outcome in ("stopped", "unavailable"):
        with jobs.context.database.transaction() as session:
            taken = leases.claim_for_training(session, jobs.context.worker_id, 1, 30)
        jobs.pause(job_id)
        if outcome == "stopped":
            with jobs.context.database.transaction() as session:
                leases.retry_or_fail(session, taken[0], WorkerCrashedError("Gone."), max_attempts=1)
        else:
            requeue(jobs.context, taken[0], UnavailableError("Storage is away."))
        _assert_without_a_lease(jobs, job_id, "paused")
        assert jobs.outcomes(job_id)[-1] == outcome
        jobs.resume(job_id)
    messages = jobs.messages(job_id)
    assert "Gone. The job is paused at its beginning." in messages
    assert "The job waits: Storage is away." in messages


def test_a_worker_that_stops_leaves_a_pausing_job_paused(jobs: Jobs, attempt: Begin) -> None:
    job_id = jobs.prepared()
    # Asked to stop before its first step, the process ends without a word.
    run = attempt(Script.start, lambda script: script)
    run.child.may_end.clear()
    jobs.pause(job_id)
    jobs.context.stopping.set()
    run.child.may_end.set()
    assert run.join() is Ending.PAUSED
    _assert_without_a_lease(jobs, job_id, "paused")
    assert jobs.outcomes(job_id) == ["prepared", "paused"]


def test_storage_that_is_away_at_the_last_save_point_is_waited_for(
    context: WorkerContext, jobs: Jobs, attempt: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = jobs.prepared()
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
    jobs.pause(job_id)
    assert run.join() is Ending.PAUSED
    assert [point["step"] for point in jobs.row(job_id).save_points] == [2]


def test_what_cannot_be_paused_or_resumed_is_400_with_the_status(client: openai.OpenAI, jobs: Jobs) -> None:
    unprepared, job_id = jobs.create(), jobs.prepared()
    verbs = client.fine_tuning.jobs

    def refused(act: Callable[[str], object], whose: str, *words: str) -> None:
        with pytest.raises(openai.BadRequestError) as caught:
            act(whose)
        assert caught.value.code == "invalid_job_state"
        assert all(word in str(caught.value) for word in words), str(caught.value)

    refused(verbs.pause, unprepared, "validating_files", "once it is queued or running")
    refused(verbs.resume, unprepared, "validating_files", "only a paused job")
    refused(verbs.resume, job_id, "queued")
    verbs.pause(job_id)
    refused(verbs.pause, job_id, "paused already")
    assert verbs.cancel(job_id).status == "cancelled"
    for act in (verbs.pause, verbs.resume, verbs.cancel):
        refused(act, job_id, "ended with status cancelled")
    for act in (verbs.pause, verbs.resume):
        with pytest.raises(openai.NotFoundError):
            act("ftjob-nothing")


def test_a_verb_sent_again_because_its_answer_was_lost_is_no_fault_and_does_nothing_twice(
    api: Api, context: WorkerContext, jobs: Jobs
) -> None:
    job_id = jobs.prepared()

    def post(verb: str, **headers: str) -> httpx2.Response:
        return api.ask("POST", f"/fine_tuning/jobs/{job_id}/{verb}", headers=headers)

    again = {"X-Stainless-Retry-Count": "1"}
    assert post("resume", **again).status_code == 400, "never done, so no repeat of anything"
    for verb, status in (("pause", "paused"), ("resume", "queued"), ("pause", "paused")):
        assert post(verb).json()["status"] == status
        num_events = jobs.row(job_id).last_event_seq
        answer = post(verb, **again)
        assert (answer.status_code, answer.json()["status"]) == (200, status)
        assert post(verb).status_code == 400
        assert jobs.row(job_id).last_event_seq == num_events
    # A repeat that finds its act undone by another does it: it may never have arrived before.
    jobs.resume(job_id)
    assert post("pause", **again).json()["status"] == "paused"
    # What has gone on meanwhile is no fault either.
    post("resume")
    assert _claim(context) == job_id
    assert post("resume", **again).json()["status"] == "running"
    assert post("cancel", **{"Idempotency-Key": "k"}).json()["status"] == "cancelled"
    assert post("cancel", **{"Idempotency-Key": "k"}).json()["status"] == "cancelled"
    assert post("cancel", **again).status_code == 400
