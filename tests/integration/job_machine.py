"""The life of jobs as a Hypothesis state machine: clients over HTTP, workers by services.jobs.leases; time.

After every act what the model says is held against what there is (job_model.py).
"""

from typing import Any

from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from sqlalchemy import text

from db.tables import Job
from luthier.core.errors import NonFiniteLossError, WorkerCrashedError
from luthier.core.ids import new_id
from luthier.core.specs import TrainingSpec
from luthier.core.states import JobStatus
from services.capacity import workers
from services.files import files
from services.files.files import StoredFile
from services.jobs import attempts, events, leases, pausing
from services.jobs.events import NewEvent
from services.jobs.leases import LeaseLostError
from services.models import models
from tests.integration.job_model import MAX_ATTEMPTS, JobModel, Known
from tests.integration.training_script import BASE_FACTS

S = JobStatus
_MAX_JOBS = 5
_WORKERS = ("worker-1", "worker-2")


class JobMachine(JobModel):
    """Clients, workers, and time, in any order."""

    # ---- clients

    @initialize()
    def have_jobs_at_several_points(self) -> None:
        self.upload()
        for _ in range(3):
            self._create(next(iter(self.files)), is_sent_again=False)
        for job in self.jobs.values():
            self._claim_to_prepare(job, _WORKERS[0])
        for job in list(self.jobs.values())[:2]:
            self._end_preparing(job, is_good=True)
        self.claim_to_train(_WORKERS[0])

    @precondition(lambda self: len(self.files) < 3)
    @rule()
    def upload(self) -> None:
        stored = StoredFile(new_id("file"), "rows.jsonl", "fine-tune", 10, 12, "0" * 64, "nowhere")
        with self.transaction() as session:
            files.record(session, self.scope, stored)
        self.files[stored.id] = True

    @precondition(lambda self: self.num_creates < _MAX_JOBS)
    @rule(is_sent_again=st.booleans(), data=st.data())
    def create(self, is_sent_again: bool, data: Any) -> None:
        self._create(data.draw(st.sampled_from(list(self.files))), is_sent_again=is_sent_again)

    def _create(self, file_id: str, *, is_sent_again: bool) -> None:
        self.num_creates += 1
        body = {"model": "tiny-llama", "training_file": file_id, "suffix": f"n{self.num_creates}"}
        answer = self.http.post("/fine_tuning/jobs", json=body)
        if not self.files[file_id]:
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "training_file")
            return
        assert answer.status_code == 200, answer.text
        job_id = answer.json()["id"]
        self.jobs[job_id] = Known(job_id, file_id)
        if is_sent_again:
            again = self.http.post("/fine_tuning/jobs", json=body, headers={"X-Stainless-Retry-Count": "1"})
            assert again.json()["id"] == job_id

    @rule(data=st.data())
    def delete_file(self, data: Any) -> None:
        file_id = data.draw(st.sampled_from(list(self.files)))
        answer = self.http.delete(f"/files/{file_id}")
        is_read = any(job.file_id == file_id and not job.status.is_terminal for job in self.jobs.values())
        if not self.files[file_id]:
            assert answer.status_code == 404
        elif is_read:
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "file_in_use")
        else:
            assert answer.status_code == 200, answer.text
            self.files[file_id] = False

    @rule(data=st.data(), verb=st.sampled_from(["cancel", "pause", "resume"]), is_sent_again=st.booleans())
    def ask_anything(self, data: Any, verb: str, is_sent_again: bool) -> None:
        self._ask(data.draw(st.sampled_from(list(self.jobs.values()))), verb, is_sent_again)

    @precondition(lambda self: self.held())
    @rule(data=st.data(), is_sent_again=st.booleans())
    def pause_or_resume_what_is_held(self, data: Any, is_sent_again: bool) -> None:
        job = data.draw(st.sampled_from(self.held()))
        self._ask(job, "resume" if job.status is S.PAUSING else "pause", is_sent_again)
        if job.status is S.QUEUED:
            # A worker that is notified finds it held still.
            self.claim_to_train(_WORKERS[1])

    @precondition(lambda self: self.in_status(S.PAUSED))
    @rule(data=st.data(), is_sent_again=st.booleans())
    def resume_what_is_paused(self, data: Any, is_sent_again: bool) -> None:
        self._ask(data.draw(st.sampled_from(self.in_status(S.PAUSED))), "resume", is_sent_again)

    def _ask(self, job: Known, verb: str, is_sent_again: bool) -> None:
        target = {
            "cancel": None if job.status.is_terminal else S.CANCELLED,
            "pause": {S.QUEUED: S.PAUSED, S.RUNNING: S.PAUSING}.get(job.status),
            "resume": {S.PAUSED: S.QUEUED, S.PAUSING: S.QUEUED}.get(job.status),
        }[verb]
        answer = self.http.post(f"/fine_tuning/jobs/{job.id}/{verb}")
        if target is None:
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (400, "invalid_job_state")
            assert job.status.value in error["message"]
        else:
            assert (answer.status_code, answer.json()["status"]) == (200, target.value)
            job.status = target
            job.num_events += 1
            job.done.add(verb)
            if target in (S.CANCELLED, S.PAUSED):
                self.lose(job)
        if is_sent_again:
            again = self.http.post(
                f"/fine_tuning/jobs/{job.id}/{verb}", headers={"X-Stainless-Retry-Count": "1"}
            )
            expected = 200 if verb in job.done else 400
            assert again.status_code == expected, (verb, job.status, again.text)
            if expected == 200:
                assert again.json()["status"] == job.status.value

    # ---- workers

    @precondition(lambda self: self.in_status(S.VALIDATING_FILES))
    @rule(data=st.data(), worker=st.sampled_from(_WORKERS))
    def claim_to_prepare(self, data: Any, worker: str) -> None:
        self._claim_to_prepare(data.draw(st.sampled_from(self.in_status(S.VALIDATING_FILES))), worker)

    def _claim_to_prepare(self, job: Known, worker: str) -> None:
        with self.transaction() as session:
            lease = leases.claim_for_preparing(session, job.id, worker, 60)
        if job.lease is not None:
            assert lease is None
            return
        assert lease is not None
        job.lease, job.fencing_token = lease, job.fencing_token + 1

    @precondition(lambda self: self.preparing())
    @rule(data=st.data(), is_good=st.booleans())
    def end_preparing(self, data: Any, is_good: bool) -> None:
        self._end_preparing(data.draw(st.sampled_from(self.preparing())), is_good=is_good)

    def _end_preparing(self, job: Known, *, is_good: bool) -> None:
        assert job.lease is not None
        with self.transaction() as session:
            if is_good:
                reported = NewEvent("Files validated, moving job to queued state", data={})
                leases.leave(
                    session,
                    job.lease,
                    S.QUEUED,
                    outcome="prepared",
                    event=reported,
                    prepared_key="k",
                    **leases.PROGRESS,
                )
                self.after_progress(job)
            else:
                leases.fail(session, job.lease, NonFiniteLossError("Line 3."))
        self.left(job, S.QUEUED if is_good else S.FAILED)

    @precondition(lambda self: self.in_status(S.QUEUED))
    @rule(worker=st.sampled_from(_WORKERS))
    def claim_to_train(self, worker: str) -> None:
        self._beat()
        with self.transaction() as session:
            taken = leases.claim_for_training(session, worker, 1, 60)
        is_busy = any(job.lease is not None and job.lease.worker_id == worker for job in self.held())
        waiting = [
            job
            for job in self.in_status(S.QUEUED)
            if job.lease is None and (worker not in job.avoided or len(job.avoided) == len(_WORKERS))
        ]
        if is_busy or not waiting:
            assert taken is None
            return
        assert taken is not None
        lease, job = taken[0], waiting[0]
        assert lease.job_id == job.id, "not the oldest"
        if not job.has_started:
            job.has_started = True
            job.num_events += 1
        job.lease, job.fencing_token = lease, job.fencing_token + 1
        job.status = S.RUNNING
        assert lease.fencing_token == job.fencing_token

    def _beat(self) -> None:
        """Both workers live, whatever they do."""
        with self.transaction() as session:
            for worker in _WORKERS:
                workers.beat(session, worker, hostname="here", num_slots=1, facts={})

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def train_a_step(self, data: Any) -> None:
        job = data.draw(st.sampled_from(self.held()))
        assert job.lease is not None
        job.step += 1
        with self.transaction() as session:
            assert leases.renew(session, job.lease, 60) is job.status
            leases.update_job(session, job.lease, step=job.step)
            events.append(session, job.id, [NewEvent(f"Step {job.step}", type="metrics", data={})])
        job.is_expired = False
        job.num_events += 1

    @precondition(lambda self: self.held())
    @rule(data=st.data(), is_published=st.booleans())
    def keep(self, data: Any, is_published: bool) -> None:
        """A save point, or a checkpoint."""
        job = data.draw(st.sampled_from(self.held()))
        assert job.lease is not None
        with self.transaction() as session:
            if is_published:
                self._register(session, job, "checkpoint")
            else:
                job.steps_kept = [*job.steps_kept, job.step][-2:]
                points = [{"key": f"k{step}", "step": step} for step in job.steps_kept]
                leases.update_job(session, job.lease, save_points=points, **leases.PROGRESS)
                self.after_progress(job)

    def _register(self, session: Any, job: Known, kind: str) -> str:
        assert job.lease is not None
        leases.update_job(session, job.lease, step=Job.step)
        row = session.get_one(Job, job.id, populate_existing=True)
        spec = TrainingSpec.model_validate(row.spec).model_copy(update={"base": BASE_FACTS})
        name = models.make_name("tiny-llama", "personal", row.suffix)
        models.register(
            session,
            row,
            spec,
            name=name,
            kind=kind,
            step=job.step,
            artifact_key="k",
            artifact_digest="sha256:1",
            metrics={"step": job.step},
        )
        if job.step not in job.checkpoints:
            job.checkpoints.append(job.step)
        return name

    @precondition(lambda self: self.held())
    @rule(data=st.data(), is_good=st.booleans())
    def finish(self, data: Any, is_good: bool) -> None:
        job = data.draw(st.sampled_from(self.held()))
        assert job.lease is not None
        with self.transaction() as session:
            if is_good:
                name = self._register(session, job, "tuned")
                reported = NewEvent("The job has successfully completed", data={})
                leases.leave(
                    session,
                    job.lease,
                    S.SUCCEEDED,
                    outcome="succeeded",
                    event=reported,
                    fine_tuned_model=name,
                    trained_tokens=10,
                )
            else:
                leases.fail(session, job.lease, NonFiniteLossError("Step 3."))
        self.left(job, S.SUCCEEDED if is_good else S.FAILED)

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def note_that_it_is_to_stop(self, data: Any) -> None:
        job = data.draw(st.sampled_from(self.held()))
        job.is_stopping = True
        with self.transaction() as session:
            attempts.note_stopping(session, job.id, job.fencing_token)

    @precondition(lambda self: self.held())
    @rule(data=st.data(), how=st.sampled_from(["stopped", "unavailable", "crashed"]))
    def end_before_the_end(self, data: Any, how: str) -> None:
        self._end_before_the_end(data.draw(st.sampled_from(self.held())), how)

    @precondition(lambda self: self.held())
    @rule(data=st.data())
    def crash_as_often_as_it_may(self, data: Any) -> None:
        job = data.draw(st.sampled_from(self.held()))
        assert job.lease is not None
        job.num_crashes = MAX_ATTEMPTS - 1
        job.avoided = set(_WORKERS) - {job.lease.worker_id}
        with self.transaction() as session:
            row = session.get_one(Job, job.id)
            row.num_crashes, row.avoided_workers = job.num_crashes, sorted(job.avoided)
        self._end_before_the_end(job, "crashed")

    def _end_before_the_end(self, job: Known, how: str) -> None:
        assert job.lease is not None
        self._beat()
        with self.transaction() as session:
            if how == "stopped":
                status = pausing.end_stopped(session, job.lease)
            elif how == "unavailable":
                reported = NewEvent("The job waits", data={})
                status = leases.wait_again(session, job.lease, outcome=how, event=reported)
            else:
                error = WorkerCrashedError("Gone.")
                status = leases.retry_or_fail(session, job.lease, error, max_attempts=MAX_ATTEMPTS)
        expected = self.after_crash(job) if how == "crashed" else leases.WAITS_AS[job.status]
        assert status is expected
        self.left(job, expected)

    # ---- time

    @precondition(lambda self: self.held() or self.preparing())
    @rule(data=st.data())
    def let_a_lease_run_out(self, data: Any) -> None:
        job = data.draw(st.sampled_from([*self.held(), *self.preparing()]))
        job.is_expired = True
        with self.transaction() as session:
            session.execute(
                text("UPDATE jobs SET lease_expires_at = now() - interval '1 second' WHERE id = :id"),
                {"id": job.id},
            )

    @precondition(lambda self: any(job.is_expired for job in self.jobs.values()))
    @rule()
    def sweep(self) -> None:
        expired = [job for job in self.jobs.values() if job.lease is not None and job.is_expired]
        with self.transaction() as session:
            taken = leases.sweep(session)
        assert set(taken) == {job.id for job in expired}
        for job in expired:
            self.left(job, self.after_loss(job))

    @precondition(lambda self: self.zombies)
    @rule(data=st.data())
    def let_a_zombie_write(self, data: Any) -> None:
        zombie = data.draw(st.sampled_from(self.zombies))
        error = WorkerCrashedError("x")
        for write in (
            lambda session: leases.renew(session, zombie, 60),
            lambda session: leases.update_job(session, zombie, step=99, save_points=[]),
            lambda session: leases.leave(session, zombie, S.SUCCEEDED, outcome="x"),
            lambda session: leases.fail(session, zombie, error),
            lambda session: leases.retry_or_fail(session, zombie, error, max_attempts=1),
            lambda session: leases.wait_again(session, zombie, outcome="x", event=NewEvent("x")),
            lambda session: pausing.end_stopped(session, zombie),
        ):
            try:
                with self.transaction() as session:
                    write(session)
            except LeaseLostError:
                continue
            raise AssertionError("a worker that lost its lease has written")
