"""`/readyz`, which anybody may ask as often as they like."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
from sqlalchemy import event, text

from tests.conftest import Api, wait_until


def _ask(api: Api) -> httpx2.Response:
    return httpx2.get(f"{api.base_url}/readyz", timeout=10)


def test_many_questions_are_one_look_into_the_database(api: Api) -> None:
    looks: list[str] = []

    def note(*reported: Any) -> None:
        if "alembic_version" in reported[2]:
            looks.append(reported[2])

    event.listen(api.state.database.engine, "before_cursor_execute", note)
    with ThreadPoolExecutor(16) as pool:
        answers = [*pool.map(lambda _: _ask(api), range(64))]
    assert {answer.status_code for answer in answers} == {200}
    # One a second; the machine may be slow.
    assert 1 <= len(looks) <= 16


def test_a_database_that_hangs_or_has_another_schema_is_unready_and_found_well_again(api: Api) -> None:
    with api.state.database.engine.begin() as holding:
        holding.execute(text("LOCK TABLE alembic_version IN ACCESS EXCLUSIVE MODE"))
        answer = _ask(api)
        assert (answer.status_code, answer.json()["status"]) == (503, "unready")
    wait_until(lambda: _ask(api).status_code == 200, what="it is ready again")
    with api.state.database.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    wait_until(lambda: _ask(api).status_code == 503, what="it sees the older schema")
    assert "The schema is at 0001" in _ask(api).json()["reason"]
