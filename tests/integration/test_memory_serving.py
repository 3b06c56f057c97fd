"""Serving in the ledger of memory: a worker speaks for it, with real PostgreSQL and a stand-in server."""

import json
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest
from sqlalchemy import select, text, update

from db.memory_tables import MemoryGrant
from db.tables import Job
from luthier.core.devices import Device
from luthier.core.inference import MEMORY_PATH, MemoryOrder, MemoryState
from services import bootstrap, memory, serving
from tests.rows import colour_rows, jsonl
from worker.context import WorkerContext
from worker.serving import balance
from worker.tasks.prepare import prepare
from worker.tasks.train import claim

_GB = 1_000_000_000
_DEVICE = Device(socket.gethostname(), "cpu", 10 * _GB)


@dataclass
class StandIn:
    """A server with so many bytes in use and so many idle, which it gives back when it is told to."""

    needed: int = 3 * _GB
    idle: int = 4 * _GB
    server_id: str = "server-1"
    orders: list[MemoryOrder] = field(default_factory=list)
    url: str = ""

    def state(self) -> dict[str, Any]:
        return MemoryState(
            server_id=self.server_id,
            hostname=_DEVICE.hostname,
            device="cpu",
            held_bytes=self.needed + self.idle,
            idle_bytes=self.idle,
            floor_bytes=_GB,
            version=self.orders[-1].version if self.orders else 0,
        ).model_dump()

    def obey(self, order: MemoryOrder) -> None:
        self.orders.append(order)
        self.idle = max(0, min(self.idle, order.max_bytes - self.needed))


@pytest.fixture
def server() -> Iterator[StandIn]:
    stand_in = StandIn()

    class Face(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            stand_in.obey(MemoryOrder.model_validate_json(body))
            self._answer()

        def _answer(self) -> None:
            assert self.path == MEMORY_PATH
            body = json.dumps(stand_in.state()).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Face)
    stand_in.url = f"http://127.0.0.1:{listening.server_port}"
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield stand_in
    listening.shutdown()
    listening.server_close()


@pytest.fixture
def context(context: WorkerContext, server: StandIn) -> WorkerContext:
    settings = context.settings.model_copy(update={"inference_url": server.url})
    return replace(context, device=_DEVICE, settings=settings)


def _queue(client: openai.OpenAI, context: WorkerContext, size: float) -> str:
    file = client.files.create(file=("rows.jsonl", jsonl(colour_rows(12))), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="tiny-llama", training_file=file.id, seed=1)
    prepare(context, job.id)
    peak = round(size * _GB / memory.MARGIN) + 1
    with context.database.transaction() as session:
        session.execute(update(Job).where(Job.id == job.id).values(peak_bytes=peak, least_bytes=peak))
    return job.id


def _serving(context: WorkerContext) -> dict[str, int]:
    with context.database.transaction() as session:
        rows = session.scalars(select(MemoryGrant).where(MemoryGrant.kind == memory.SERVING))
        return {row.holder_id: row.num_bytes for row in rows}


def _waits_told(client: openai.OpenAI, job_id: str) -> list[str]:
    messages = [event.message for event in client.fine_tuning.jobs.list_events(job_id, limit=100)]
    return [message for message in messages if message.startswith("Waiting for")]


def test_serving_may_have_all_until_a_job_needs_it_and_gives_back_what_is_idle(
    client: openai.OpenAI, context: WorkerContext, server: StandIn
) -> None:
    balance(context)
    assert server.orders[-1].max_bytes == 10 * _GB
    assert _serving(context) == {"server-1": 10 * _GB}
    job_id = _queue(client, context, 6)
    claimed = claim(context)
    assert claimed is not None
    assert claimed.lease.job_id == job_id
    # It started at once, so there was nothing to tell.
    assert _waits_told(client, job_id) == []
    assert 0.9 * _GB < server.idle < _GB
    assert server.orders[-1].max_bytes == 10 * _GB - memory.wanted_bytes(*_peak_of(context, job_id))
    balance(context)
    assert _serving(context)["server-1"] == server.orders[-1].max_bytes
    with context.database.transaction() as session:
        memory.release(session, job_id, claimed.lease.epoch)
    balance(context)
    assert server.orders[-1].max_bytes == 10 * _GB


def _peak_of(context: WorkerContext, job_id: str) -> tuple[int | None, Device]:
    with context.database.transaction() as session:
        return session.get_one(Job, job_id).peak_bytes, _DEVICE


def test_a_job_waits_for_what_serving_needs_and_nothing_is_given_back_in_vain(
    client: openai.OpenAI, context: WorkerContext, server: StandIn
) -> None:
    job_id = _queue(client, context, 8)
    for _ in range(3):
        assert claim(context) is None
    told = f"Waiting for 8.0 GB on {_DEVICE.hostname} cpu (serving holds 10.0 GB, all is 10.0 GB)"
    assert _waits_told(client, job_id) == [told]
    assert server.idle == 4 * _GB
    server.needed = 1_500_000_000
    claimed = claim(context)
    assert claimed is not None
    assert claimed.lease.job_id == job_id


def test_a_job_whose_number_is_rough_starts_with_what_serving_can_give_back(
    client: openai.OpenAI, context: WorkerContext, server: StandIn
) -> None:
    job_id = _queue(client, context, 9)
    with context.database.transaction() as session:
        session.execute(update(Job).where(Job.id == job_id).values(least_bytes=_GB))
    claimed = claim(context)
    assert claimed is not None
    with context.database.transaction() as session:
        given = session.scalar(select(MemoryGrant.num_bytes).where(MemoryGrant.holder_id == job_id))
    assert (given, server.idle, server.orders[-1].max_bytes) == (7 * _GB, 0, 3 * _GB)


def test_a_job_that_has_waited_long_is_given_all_that_serving_gives_up_over_time(
    client: openai.OpenAI, context: WorkerContext, server: StandIn
) -> None:
    job_id = _queue(client, context, 8)
    assert claim(context) is None
    with context.database.transaction() as session:
        session.execute(text("UPDATE memory_grants SET since = now() - interval '1 hour' WHERE kind = 'job'"))
    assert claim(context) is None
    assert server.idle == 0
    assert server.orders[-1].max_bytes < 2 * _GB
    # Its answers have ended, and the ceiling let no others begin on new models.
    server.needed = 1_500_000_000
    claimed = claim(context)
    assert claimed is not None
    assert claimed.lease.job_id == job_id


def test_a_server_that_has_started_anew_takes_the_place_of_the_one_before(
    context: WorkerContext, server: StandIn
) -> None:
    balance(context)
    server.server_id, server.orders = "server-2", []
    balance(context)
    assert _serving(context) == {"server-2": 10 * _GB}


def test_servers_of_an_earlier_run_are_forgotten_and_jobs_are_not(
    client: openai.OpenAI, context: WorkerContext, server: StandIn
) -> None:
    _queue(client, context, 2)
    assert claim(context) is not None
    assert _serving(context)
    with context.database.transaction() as session:
        serving.forget_all(session)
    assert _serving(context) == {}
    with context.database.transaction() as session:
        (left,) = session.scalars(select(MemoryGrant)).all()
        assert (left.kind, left.num_bytes) == (memory.JOB, 2 * _GB)


@pytest.mark.parametrize(("arguments", "left"), [([], ["server-1"]), (["--alone"], [])])
def test_bootstrap_forgets_servers_only_when_it_is_told_that_no_worker_runs(
    context: WorkerContext,
    server: StandIn,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    left: list[str],
) -> None:
    balance(context)
    settings = context.settings
    monkeypatch.setenv("LUTHIER_DATABASE_URL", settings.database_url.get_secret_value())
    monkeypatch.setenv("LUTHIER_SECRET_KEY", settings.secret_key.get_secret_value())
    monkeypatch.setenv("LUTHIER_BASES_DIR", str(settings.bases_dir))
    monkeypatch.setenv("LUTHIER_MODELS_FILE", str(settings.models_file))
    monkeypatch.setattr(sys, "argv", ["bootstrap", *arguments])
    bootstrap.main()
    assert list(_serving(context)) == left


def test_several_servers_share_what_jobs_leave(context: WorkerContext) -> None:
    def state(number: int, held: int, version: int) -> MemoryState:
        return MemoryState(
            server_id=f"s{number}",
            hostname=_DEVICE.hostname,
            device="cpu",
            held_bytes=held,
            idle_bytes=0,
            floor_bytes=0,
            version=version,
        )

    versions = [0, 0]
    for _ in range(3):
        for number in (0, 1):
            with context.database.transaction() as session:
                order = serving.plan(session, _DEVICE, state(number, _GB, versions[number]), lease_seconds=30)
            versions[number] = order.version
            with context.database.transaction() as session:
                serving.confirm(session, _DEVICE, state(number, _GB, order.version), order)
    assert _serving(context) == {"s0": 5 * _GB, "s1": 5 * _GB}


def test_a_lower_ceiling_counts_only_once_the_server_has_agreed_and_nothing_newer_was_told(
    context: WorkerContext, server: StandIn
) -> None:
    balance(context)
    state = MemoryState.model_validate(server.state())
    with context.database.transaction() as session:
        session.add(
            MemoryGrant(
                **memory.key_of(_DEVICE, memory.JOB, "ftjob-1", 1),
                num_bytes=2 * _GB,
                wanted_bytes=2 * _GB,
                expires_at=text("now() + interval '1 hour'"),
            )
        )
    with context.database.transaction() as session:
        order = serving.plan(session, _DEVICE, state, lease_seconds=30)
    assert order.max_bytes == 8 * _GB
    assert _serving(context) == {"server-1": 10 * _GB}
    with context.database.transaction() as session:
        newer = serving.plan(session, _DEVICE, state, lease_seconds=30)
        agreed = state.model_copy(update={"version": order.version})
        serving.confirm(session, _DEVICE, agreed, order)
    assert _serving(context) == {"server-1": 10 * _GB}
    with context.database.transaction() as session:
        agreed = state.model_copy(update={"version": newer.version})
        serving.confirm(session, _DEVICE, agreed, newer)
    assert _serving(context) == {"server-1": 8 * _GB}


def test_a_server_of_another_host_or_device_and_none_at_all_hold_nothing_here(
    context: WorkerContext, server: StandIn
) -> None:
    for device in (replace(_DEVICE, hostname="elsewhere"), replace(_DEVICE, name="cuda:0")):
        balance(replace(context, device=device))
    nobody = context.settings.model_copy(update={"inference_url": "unix:///nowhere/at/all.sock"})
    balance(replace(context, settings=nobody))
    assert (server.orders, _serving(context)) == ([], {})
