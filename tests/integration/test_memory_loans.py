"""A job that lacks memory borrows idle KV cache of an inference server, here a stand-in over real HTTP."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from sqlalchemy import delete

from db.tables import Worker
from luthier.core.inference import LOANS_PATH, LoanRequest, MemoryLoan
from tests.conftest import wait_until
from tests.integration.test_memory_split import DEVICE, held, queue, waits
from tests.training import Jobs, train_next
from worker.context import WorkerContext
from worker.tasks.train import claim

_GB = 1_000_000_000


@dataclass
class StandIn:
    """A server with idle bytes, and remembers what it was asked."""

    idle: int = 4 * _GB
    asked: list[LoanRequest] = field(default_factory=list)

    def lend(self, request: LoanRequest) -> int:
        self.asked.append(request)
        lent = min(request.num_bytes, self.idle)
        return lent if lent >= request.least_bytes else 0


@pytest.fixture
def server(context: WorkerContext) -> Iterator[StandIn]:
    stand_in = StandIn()

    class Face(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == LOANS_PATH
            lent = stand_in.lend(LoanRequest.model_validate_json(body))
            answer = MemoryLoan(lent_bytes=lent).model_dump_json().encode()
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Face)
    context.settings.inference_url = f"http://127.0.0.1:{listening.server_port}"
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield stand_in
    listening.shutdown()
    listening.server_close()


@pytest.fixture
def context(context: WorkerContext) -> WorkerContext:
    with context.database.transaction() as session:
        session.execute(delete(Worker))
    settings = context.settings.model_copy(update={"lease_seconds": 0.5, "heartbeat_seconds": 0.1})
    return replace(context, device=DEVICE, settings=settings)


def _numbers(asked: list[LoanRequest]) -> list[Any]:
    return [(one.num_bytes // 10_000_000, one.least_bytes // 10_000_000) for one in asked]


def test_a_job_that_would_wait_borrows_what_it_lacks_by_one_call_and_keeps_the_loan(
    jobs: Jobs, context: WorkerContext, server: StandIn
) -> None:
    [job_id] = queue(jobs, 12.0)
    claimed = jobs.claim()
    asked = server.asked[0]
    first, *repeats = _numbers(server.asked)
    # A call for what a job lacks names the least; what repeats a loan does not.
    assert first == (200, 200)
    assert set(repeats) <= {(200, 0)}
    assert (asked.hostname, asked.device, asked.seconds) == ("here", "cpu", 2.0)
    # The rest is all of training's part.
    assert held(context.database)[job_id] == pytest.approx(10 * _GB, abs=10)
    # No event: it did not wait.
    assert waits(jobs, job_id) == []
    wait_until(lambda: len(server.asked) > 2, what="the loan is repeated")
    claimed.loan.end()
    assert _numbers(server.asked[-1:]) == [(0, 0)]
    assert {one.num_bytes for one in server.asked[:-1]} == {asked.num_bytes}


def test_a_loan_is_given_back_when_the_job_has_ended(jobs: Jobs, server: StandIn) -> None:
    [job_id] = queue(jobs, 12.0)
    assert train_next(jobs.context)
    assert jobs.status(job_id) == "succeeded"
    assert _numbers(server.asked[-1:]) == [(0, 0)]
    assert held(jobs.context.database) == {}


def test_a_job_waits_when_serving_has_too_little_idle_and_says_so(jobs: Jobs, server: StandIn) -> None:
    [job_id] = queue(jobs, 14.9)
    for _ in range(3):
        assert claim(jobs.context) is None
    assert waits(jobs, job_id) == [
        "The job waits for 14.9 GB of memory on here cpu: of training's 10.0 GB, 10.0 GB are free, and "
        "serving can lend too little of its 5.0 GB"
    ]
    assert _numbers(server.asked) == [(490, 490)] * 3
    # So that of two workers that ask for one job none gives back what the other has.
    assert len({one.loan_id for one in server.asked}) == 3
    server.idle = 5 * _GB
    claimed = jobs.claim()
    claimed.loan.end()


def test_a_job_whose_peak_is_rough_starts_with_what_serving_lends(jobs: Jobs, server: StandIn) -> None:
    [job_id] = queue(jobs, 15.0, least=13.0)
    claimed = jobs.claim()
    assert claimed.loan.num_bytes == 4 * _GB
    assert held(jobs.context.database) == {job_id: 10 * _GB}
    claimed.loan.end()


def test_where_no_server_answers_nothing_is_borrowed(jobs: Jobs, context: WorkerContext) -> None:
    context.settings.inference_url = "unix:///nowhere/at/all.sock"
    [job_id] = queue(jobs, 12.0)
    assert claim(context) is None
    assert len(waits(jobs, job_id)) == 1
