"""A database that stalls, stops and comes back: requests end soon, leases and jobs are kept."""

import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest
from pydantic import SecretStr
from sqlalchemy import text

from db.session import Database
from db.tables import Attempt, Job, Model
from luthier.core.errors import UnavailableError
from luthier.core.settings import Settings
from services.accounts import keys
from services.jobs import leases
from services.jobs.leases import Lease
from tests.conftest import Api, Server, fresh_database, make_settings, running_postgres, serve_api, wait_until
from tests.folders import TEMPORARY_FOLDER
from tests.proxy import StallingProxy, stalling_proxy
from tests.rows import colour_rows, jsonl
from tests.workers import running_worker
from worker.app import sweep
from worker.context import Watch, make_context
from worker.heartbeat import LeaseHeartbeat

# A stalled database costs a request 5 s; this machine may be busy.
_MAX_SECONDS = 8.0


@pytest.fixture
def short_folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="px-", dir=TEMPORARY_FOLDER))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def proxy(postgres: Server, short_folder: Path) -> Iterator[StallingProxy]:
    with stalling_proxy(short_folder, postgres.socket_folder) as made:
        yield made


@pytest.fixture
def proxied(proxy: StallingProxy, postgres: Server, short_folder: Path, settings: Settings) -> Settings:
    url = settings.database_url.get_secret_value()
    through = url.replace(str(postgres.socket_folder).replace("/", "%2F"), str(short_folder))
    through = through.replace(str(postgres.socket_folder), str(short_folder))
    assert str(short_folder) in through
    return settings.model_copy(update={"database_url": SecretStr(through)})


def test_a_database_that_stalls_costs_a_request_seconds_and_is_used_again_when_it_answers(
    proxy: StallingProxy, proxied: Settings
) -> None:
    database = Database(proxied.database_url.get_secret_value(), pool_size=24)
    with serve_api(proxied, database) as api, httpx2.Client(headers=api.headers, timeout=60) as http:
        url = f"{api.base_url}/v1/models"
        assert http.get(url).status_code == 200
        proxy.stall()
        for _ in range(2):
            began = time.monotonic()
            answer = http.get(url)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "service_unavailable")
            assert time.monotonic() - began < _MAX_SECONDS
        assert http.get(f"{api.base_url}/healthz").status_code == 200
        proxy.heal()
        wait_until(lambda: http.get(url).status_code == 200, seconds=_MAX_SECONDS, what="answered again")
    database.close()
    # Else a connection that was begun in the stall is waited for when the database is dropped.
    proxy.close()


def test_a_stalled_statement_ends_its_transaction(proxy: StallingProxy, proxied: Settings) -> None:
    database = Database(proxied.database_url.get_secret_value(), pool_size=1, answer_seconds=1)
    began = time.monotonic()
    with pytest.raises(UnavailableError), database.transaction() as session:
        session.execute(text("SELECT 1"))
        proxy.stall()
        session.execute(text("SELECT 1"))
    assert time.monotonic() - began < _MAX_SECONDS
    proxy.heal()
    with database.transaction() as session:
        assert session.scalar(text("SHOW idle_in_transaction_session_timeout")) == "30s"
        assert session.scalar(text("SHOW statement_timeout")) == "1s"
        assert session.scalar(text("SHOW lock_timeout")) == "750ms"
    database.close()


def _create(client: openai.OpenAI, *, n_epochs: int = 1) -> str:
    file = client.files.create(file=("rows.jsonl", jsonl(colour_rows(20))), purpose="fine-tune")
    return client.fine_tuning.jobs.create(
        model="tiny-llama",
        training_file=file.id,
        seed=1,
        hyperparameters={"n_epochs": n_epochs, "batch_size": 1},
        extra_body={"training": {"precision": "float32", "save_every_steps": 10}},
    ).id


def test_a_stall_costs_no_lease_whatever_the_database_says_afterwards(
    api: Api, proxy: StallingProxy, proxied: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = _create(api.client())
    context = make_context(proxied.model_copy(update={"lease_seconds": 30}))
    with context.database.transaction() as session:
        lease = leases.claim_for_preparing(session, job_id, context.worker_id, 30)
    assert lease is not None
    heartbeat = LeaseHeartbeat(context, lease)
    renewed = _count_renewals(monkeypatch)
    thread = threading.Thread(target=heartbeat.run, daemon=True)
    thread.start()
    wait_until(lambda: len(renewed) > 1, what="renewed")
    proxy.stall()
    time.sleep(1)
    proxy.close()
    before = len(renewed)
    # The way to the database is gone for good, and then it is another one.
    context.database = api.state.database
    wait_until(lambda: len(renewed) > before + 1, what="renewed again")
    assert thread.is_alive()
    heartbeat.check()
    heartbeat.stop()
    thread.join()


def _count_renewals(monkeypatch: pytest.MonkeyPatch) -> list[Lease]:
    renewed: list[Lease] = []
    renew = leases.renew

    def count(session: object, lease: Lease, lease_seconds: float) -> object:
        status = renew(session, lease, lease_seconds)
        if len(renewed) == 1:
            renewed.append(lease)
            raise ValueError("an unforeseen answer")
        renewed.append(lease)
        return status

    monkeypatch.setattr(leases, "renew", count)
    return renewed


def test_nothing_is_taken_until_the_database_was_seen_for_a_whole_lease() -> None:
    now = 0.0
    watch = Watch(30, 5, clock=lambda: now)
    taken = []
    for now in (0, 5, 10, 15, 20, 25, 30, 35, 100, 105, 110, 115, 120, 125, 130, 135):
        if watch.has_seen_a_lease():
            taken.append(now)
    assert taken == [30, 35, 130, 135]


def test_a_sweeper_that_has_just_come_back_takes_no_job(api: Api, settings: Settings) -> None:
    job_id = _create(api.client())
    with api.state.database.transaction() as session:
        assert leases.claim_for_preparing(session, job_id, "worker", -1) is not None
    context = make_context(settings)

    def holder() -> tuple[str | None, int]:
        with api.state.database.transaction() as session:
            row = session.get_one(Job, job_id)
            return row.lease_owner, row.num_crashes

    sweep(context)
    assert holder() == ("worker", 0)
    deadline = time.monotonic() + settings.lease_seconds + 60
    while holder()[0] is not None and time.monotonic() < deadline:
        sweep(context)
        time.sleep(0.2)
    assert holder() == (None, 0)
    context.database.close()


@pytest.mark.full
def test_an_outage_of_two_leases_is_no_crash_of_jobs_that_trained(tiny_base: Path, tmp_path: Path) -> None:
    with running_postgres() as server, fresh_database(server) as database:
        # Renewed once a second: who sweeps is most often back before who renews.
        slow = {"lease_seconds": 4, "control_seconds": 1, "heartbeat_seconds": 1}
        settings = make_settings(database, tiny_base, tmp_path).model_copy(update=slow)
        sweeper = make_context(settings)
        with (
            serve_api(settings, database) as api,
            running_worker(settings, tmp_path / "a.log", "--no-broker"),
            running_worker(settings, tmp_path / "b.log", "--no-broker"),
        ):
            client = api.client()
            disturbed = [_create(client, n_epochs=10) for _ in range(2)]

            def steps() -> list[int]:
                with database.transaction() as session:
                    return [session.get_one(Job, job_id).step for job_id in disturbed]

            wait_until(lambda: min(steps()) > 5, seconds=120, what="both train")
            assert max(steps()) < 190, "too late: one is nearly done"
            sweep(sweeper)
            server.stop()
            time.sleep(2 * settings.lease_seconds)
            server.start()
            sweep(sweeper)
            sweeper.database.close()
            undisturbed = _create(client, n_epochs=10)
            jobs = [*disturbed, undisturbed]

            def statuses() -> set[str]:
                return {client.fine_tuning.jobs.retrieve(job_id).status for job_id in jobs}

            wait_until(lambda: statuses() == {"succeeded"}, seconds=180, what="all succeed")
            with database.transaction() as session:
                rows = [session.get_one(Job, job_id) for job_id in disturbed]
                assert [(row.num_crashes, row.num_losses) for row in rows] == [(0, 0)] * 2
                found = session.query(Attempt).filter(Attempt.job_id.in_(disturbed))
                assert sorted(str(one.outcome) for one in found) == ["prepared"] * 2 + ["succeeded"] * 2
                models = session.query(Model).filter(Model.job_id.in_(jobs), Model.kind == "tuned")
                assert len({model.artifact_digest for model in models}) == 1


def test_two_first_keys_of_a_new_project_make_it_once(api: Api) -> None:
    answers: list[int] = []

    def create() -> None:
        body = {"name": "second", "project": "new"}
        answer = httpx2.post(f"{api.base_url}/v1/keys", headers=api.headers, json=body, timeout=60)
        answers.append(answer.status_code)

    thread = threading.Thread(target=create)
    with api.state.database.transaction() as session:
        scope = keys.authenticate(session, api.key)
        keys.ensure_project(session, scope.organization_id, "new")
        thread.start()
        # It asks while the first has not committed yet.
        time.sleep(0.5)
    thread.join(timeout=30)
    assert answers == [200]
