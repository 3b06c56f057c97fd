"""Keys and names of requests for answers, looked up in real PostgreSQL, over HTTP."""

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import httpx2
from sqlalchemy import text

from api.deps import MAX_DATABASE_REQUESTS
from luthier.core.ids import new_api_key
from tests.aliases import CHECKPOINT, V1, V2, Aliases
from tests.conftest import TINY_BASE, Api


def ask(api: Api, key: str, model: Any, *, timeout: float = 30) -> httpx2.Response:
    return httpx2.post(
        f"{api.base_url}/v1/completions",
        headers={"Authorization": f"Bearer {key}"},
        json={"model": model, "prompt": "a"},
        timeout=timeout,
    )


def test_each_of_many_at_once_gets_its_own(api: Api, ours: Aliases) -> None:
    ours.put("prod", V1)
    theirs = ours.ok("POST", "/keys", {"name": "other", "project": "other"})["key"]
    cases = [
        (api.key, V1, None),
        (theirs, V1, "model_not_found"),
        (new_api_key(), V1, "invalid_api_key"),
        (api.key, "prod", None),
        (theirs, "prod", "model_not_found"),
        ("no key", None, "invalid_api_key"),
        (api.key, None, "missing_required_parameter"),
        (api.key, "a\x00b", "invalid_value"),
        (api.key, "x" * 100_000, "model_not_found"),
        (theirs, TINY_BASE, None),
    ] * 3
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda case: ask(api, *case[:2]), cases))
    codes = [None if one.status_code == 200 else one.json()["error"]["code"] for one in answers]
    assert codes == [code for _, _, code in cases]


def test_a_model_shared_with_one_project_is_shared_with_no_other(api: Api, ours: Aliases) -> None:
    granted, other = (ours.ok("POST", "/keys", {"name": name, "project": name}) for name in ("a", "b"))
    path = f"/fine_tuning/checkpoints/{quote(CHECKPOINT, safe='')}/permissions"
    ours.ok("POST", path, {"project_ids": [granted["project_id"]]})
    found = [ask(api, key, CHECKPOINT).status_code for key in (other["key"], granted["key"], api.key)]
    assert found == [404, 200, 200]


def test_a_swap_or_a_revocation_holds_from_the_next_request_on(api: Api, ours: Aliases) -> None:
    ours.put("prod", V1)
    made = ours.ok("POST", "/keys", {"name": "short-lived"})
    assert ask(api, made["key"], "prod").status_code == 200
    with api.state.database.transaction() as session:
        used = session.scalar(text("SELECT last_used_at FROM api_keys WHERE id = :id"), {"id": made["id"]})
    assert used is not None
    ours.put("prod", V2)
    assert ask(api, made["key"], "prod").status_code == 200
    digests = [target.digest for _, _, target in api.backend.asked if target.model == "prod"]
    assert digests[-1] == "sha256:2"
    ours.ok("DELETE", f"/keys/{made['id']}")
    assert ask(api, made["key"], "prod").status_code == 401


def test_a_database_that_hangs_costs_each_request_a_503_and_holds_up_nothing_else(api: Api) -> None:
    num_asked = MAX_DATABASE_REQUESTS + 4
    with ThreadPoolExecutor(num_asked) as pool:
        with api.state.database.transaction() as session:
            session.execute(text("LOCK TABLE api_keys IN ACCESS EXCLUSIVE MODE"))
            began = time.monotonic()
            asking = [pool.submit(ask, api, api.key, TINY_BASE) for _ in range(num_asked)]
            assert httpx2.get(f"{api.base_url}/healthz", timeout=2).status_code == 200
            answers = [one.result() for one in asking]
            # 3 s, on a machine that is busy.
            assert time.monotonic() - began < 12
        assert {(one.status_code, one.json()["error"]["code"]) for one in answers} == {
            (503, "service_unavailable")
        }
        assert all(int(one.headers["retry-after"]) >= 1 for one in answers)
        # Those that hung have given their turns back.
        assert {one.status_code for one in pool.map(lambda _: ask(api, api.key, TINY_BASE), asking)} == {200}


def test_a_url_without_v1_says_where_a_base_url_ends(api: Api) -> None:
    for path, is_said in (("/chat/completions", True), ("/v1/chat/completion", False)):
        error = httpx2.post(f"{api.base_url}{path}", headers=api.headers, json={}).json()["error"]
        assert error["code"] == "unknown_url"
        assert error["message"].endswith("A client's base URL ends in /v1.") is is_said
