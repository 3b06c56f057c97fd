"""Jobs in any order of acts, by clients, workers and time, against the real API and database."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test
from sqlalchemy import text

from tests.conftest import Api, Server, fresh_database, make_settings, serve_api
from tests.integration.job_machine import JobMachine
from tests.integration.job_model import AUDIT


@pytest.fixture(scope="module")
def machine(
    postgres: Server, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[type[JobMachine]]:
    with fresh_database(postgres) as database:
        with database.transaction() as session:
            session.execute(text(AUDIT))
        parts = make_settings(database, tiny_base, tmp_path_factory.mktemp("machine"))
        with serve_api(parts, database) as served:
            yield _machine_over(served)


def _machine_over(served: Api) -> type[JobMachine]:
    class Machine(JobMachine):
        api = served

    return Machine


def _run(machine: type[JobMachine], *, num_runs: int, num_steps: int) -> None:
    """Run it the same way every time: a fault found once is found again."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=num_runs,
            stateful_step_count=num_steps,
            deadline=None,
            derandomize=True,
            database=None,
            # A fault is reported by its own long story: to find a shorter one takes hundreds of runs.
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_no_order_of_acts_breaks_a_job(machine: type[JobMachine]) -> None:
    _run(machine, num_runs=8, num_steps=32)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_no_order_of_acts_breaks_a_job_in_two_hundred_long_runs(machine: type[JobMachine]) -> None:
    before = machine.num_runs
    _run(machine, num_runs=200, num_steps=50)
    assert machine.num_runs - before >= 200
