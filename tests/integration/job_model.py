"""What must be true of jobs whatever happens to them, held against rows, events, attempts and the wire.

The acts are in job_machine.py. An audit trigger notes every change of status that the database saw.
"""

from dataclasses import dataclass, field
from typing import Any

import httpx2
from hypothesis.stateful import RuleBasedStateMachine, invariant
from sqlalchemy import text

from db.tables import Attempt, File, Job, WebhookDelivery
from luthier.core.states import TRANSITIONS, JobStatus
from luthier.webhooks.events import EVENT_TYPES
from services.accounts.auth import Principal
from services.jobs import leases
from services.jobs.leases import Lease
from tests.conftest import Api

S = JobStatus
MAX_ATTEMPTS = 3
AUDIT = """
CREATE TABLE seen_changes (job_id text, source text, target text);
CREATE FUNCTION note_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF OLD.status <> NEW.status THEN INSERT INTO seen_changes VALUES (OLD.id, OLD.status, NEW.status); END IF;
  RETURN NULL;
END $$;
CREATE TRIGGER note_change AFTER UPDATE ON jobs FOR EACH ROW EXECUTE FUNCTION note_change();
"""


@dataclass
class Known:
    """What must be true of one job."""

    id: str
    file_id: str
    status: JobStatus = S.VALIDATING_FILES
    lease: Lease | None = None
    is_expired: bool = False
    has_started: bool = False
    is_stopping: bool = False
    num_crashes: int = 0
    num_losses: int = 0
    avoided: set[str] = field(default_factory=set)
    fencing_token: int = 0
    step: int = 0
    num_events: int = 2
    steps_kept: list[int] = field(default_factory=list)
    checkpoints: list[int] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    # The row and the wire's object as they were when the job was first seen to have ended.
    final: Any = None

    def released(self) -> None:
        self.lease, self.is_expired, self.is_stopping = None, False, False


class JobModel(RuleBasedStateMachine):
    """What must be true of all jobs of one run, and whether it is. `api` is set by a subclass."""

    api: Api
    num_runs = 0

    def __init__(self) -> None:
        super().__init__()
        type(self).num_runs += 1
        self.jobs: dict[str, Known] = {}
        self.files: dict[str, bool] = {}
        self.zombies: list[Lease] = []
        self.num_creates = 0
        made = httpx2.post(
            f"{self.api.base_url}/v1/keys",
            headers=self.api.headers,
            json={"name": "machine", "project": f"run-{self.num_runs}"},
        ).json()
        self.http = httpx2.Client(
            base_url=f"{self.api.base_url}/v1", headers={"Authorization": f"Bearer {made['key']}"}
        )
        # Nothing is sent to it: no worker runs.
        endpoint = {"name": "machine", "url": "https://hooks.example/", "event_types": [*EVENT_TYPES]}
        answer = self.http.post("/webhook_endpoints", json=endpoint)
        assert answer.status_code == 200, answer.text
        with self.transaction() as session:
            organization = session.execute(text("SELECT organization_id FROM projects LIMIT 1")).scalar_one()
        self.scope = Principal(organization, "personal", made["project_id"], made["id"])

    def transaction(self) -> Any:
        return self.api.state.database.transaction()

    def teardown(self) -> None:
        with self.transaction() as session:
            session.execute(
                text(
                    "UPDATE jobs SET status = 'cancelled', finished_at = now(), lease_owner = NULL, "
                    "lease_expires_at = NULL WHERE status NOT IN ('succeeded', 'failed', 'cancelled')"
                )
            )
            session.execute(text("DELETE FROM seen_changes"))
        self.http.close()

    # ---- which jobs an act can meet

    def in_status(self, *statuses: JobStatus) -> list[Known]:
        return [job for job in self.jobs.values() if job.status in statuses]

    def held(self) -> list[Known]:
        """Jobs under a lease that trains."""
        found = [job for job in self.jobs.values() if job.lease is not None]
        return [job for job in found if job.status is not S.VALIDATING_FILES]

    def preparing(self) -> list[Known]:
        return [job for job in self.in_status(S.VALIDATING_FILES) if job.lease is not None]

    # ---- how the model changes

    def lose(self, job: Known) -> None:
        if job.lease is not None:
            self.zombies.append(job.lease)
        job.released()

    def left(self, job: Known, status: JobStatus) -> None:
        self.lose(job)
        job.status = status
        job.num_events += 1

    def after_crash(self, job: Known) -> JobStatus:
        assert job.lease is not None
        if not job.is_stopping and job.status not in (S.PAUSING, S.QUEUED):
            job.num_crashes += 1
            job.avoided.add(job.lease.worker_id)
            # Both workers live, so one alone fails no job.
            if job.num_crashes >= MAX_ATTEMPTS and len(job.avoided) > 1:
                return S.FAILED
        return leases.WAITS_AS[job.status]

    def after_loss(self, job: Known) -> JobStatus:
        if not job.is_stopping and job.status not in (S.PAUSING, S.QUEUED):
            job.num_losses += 1
        return leases.WAITS_AS[job.status]

    def after_progress(self, job: Known) -> None:
        job.num_crashes = job.num_losses = 0
        job.avoided = set()

    # ---- what is always true

    @invariant()
    def the_rows_are_as_the_model_says(self) -> None:
        with self.transaction() as session:
            rows = session.query(Job).filter_by(project_id=self.scope.project_id).all()
            open_attempts = session.query(Attempt.job_id, Attempt.lease_epoch).filter(
                Attempt.project_id == self.scope.project_id, Attempt.ended_at.is_(None)
            )
            is_open = set(map(tuple, open_attempts))
            numbers = session.execute(
                text(
                    "SELECT job_id, array_agg(seq ORDER BY seq) FROM job_events "
                    "WHERE project_id = :project GROUP BY job_id"
                ),
                {"project": self.scope.project_id},
            )
            seqs = {row[0]: row[1] for row in numbers}
            changes = session.execute(text("SELECT DISTINCT source, target FROM seen_changes")).all()
            present = {row.id for row in session.query(File.id).filter(File.deleted_at.is_(None))}
        assert all(S(target) in TRANSITIONS[S(source)] for source, target in changes)
        assert {row.id for row in rows} == set(self.jobs)
        assert is_open == {(job.id, job.fencing_token) for job in self.jobs.values() if job.lease is not None}
        for row in rows:
            self._check_row(row, seqs[row.id], present)

    def _check_row(self, row: Job, seqs: list[int], present: set[str]) -> None:
        job = self.jobs[row.id]
        assert row.status == job.status.value
        assert row.lease_epoch == job.fencing_token
        assert (row.num_crashes, row.num_losses) == (job.num_crashes, job.num_losses)
        assert set(row.avoided_workers) == job.avoided
        assert row.step == job.step
        assert [point["step"] for point in row.save_points] == job.steps_kept
        assert seqs == list(range(1, row.last_event_seq + 1))
        assert row.last_event_seq == job.num_events
        assert (row.finished_at is not None) == job.status.is_terminal
        assert (row.fine_tuned_model is not None) == (job.status is S.SUCCEEDED)
        assert (row.trained_tokens is not None) == (job.status is S.SUCCEEDED)
        assert (row.error is not None) == (job.status is S.FAILED)
        if job.status.is_terminal:
            seen = {name: value for name, value in vars(row).items() if not name.startswith("_")}
            job.final = job.final or seen
            assert seen == job.final, "an ended job has changed"
            return
        assert row.training_file_id in present
        assert (row.lease_owner is not None) == (job.lease is not None)
        if job.lease is not None:
            assert row.lease_owner == job.lease.worker_id
        if job.status is S.PAUSED:
            assert (row.lease_owner, row.lease_expires_at) == (None, None)

    @invariant()
    def every_end_is_reported_once_and_nothing_else(self) -> None:
        with self.transaction() as session:
            reported = session.query(WebhookDelivery.job_id, WebhookDelivery.event_type).filter_by(
                project_id=self.scope.project_id
            )
            found = sorted(map(tuple, reported))
        ended = self.in_status(S.SUCCEEDED, S.FAILED, S.CANCELLED)
        assert found == sorted((job.id, f"fine_tuning.job.{job.status.value}") for job in ended)

    @invariant()
    def list_and_retrieve_agree(self) -> None:
        if not self.jobs:
            return
        listed = self.http.get("/fine_tuning/jobs", params={"limit": "100"}).json()
        assert listed["has_more"] is False
        assert [job["id"] for job in listed["data"]] == list(self.jobs)[::-1]
        for shown in listed["data"]:
            assert shown["status"] == self.jobs[shown["id"]].status.value
        # One of them, each in turn.
        shown = listed["data"][sum(job.num_events for job in self.jobs.values()) % len(self.jobs)]
        assert self.http.get(f"/fine_tuning/jobs/{shown['id']}").json() == shown
        kept = self.http.get(f"/fine_tuning/jobs/{shown['id']}/checkpoints", params={"limit": "100"}).json()
        steps = sorted(self.jobs[shown["id"]].checkpoints, reverse=True)
        assert [checkpoint["step_number"] for checkpoint in kept["data"]] == steps
