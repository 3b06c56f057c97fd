"""Usage of inference: who used how many tokens of which model, and when."""

import json
import re
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx2
import openai
import pytest
from sqlalchemy import func, select, text, update

from db.tables import Organization, UsageEvent
from luthier.core.inference import TokenCounts
from services.accounts import usage
from services.accounts.usage import UsageOwner
from tests.conftest import Api, wait_until
from tests.stack import ROOT

_TODAY = datetime.now(UTC).replace(hour=12, minute=0, second=0, microsecond=0)
_NOON = int((_TODAY - timedelta(days=29)).timestamp())
_DAY, _HOUR = 86400, 3600


def _make_key(api: Api, project: str) -> dict[str, Any]:
    return dict(api.ask("POST", "/keys", body={"name": "a", "project": project}).json())


def _record(api: Api, key: dict[str, Any], model: str, at: int, counts: TokenCounts) -> None:
    with api.state.database.transaction() as session:
        organization_id = session.scalars(select(Organization.id)).one()
        usage.record(session, {UsageOwner(organization_id, key["project_id"], key["id"], model): counts})
        session.execute(
            update(UsageEvent)
            .where(UsageEvent.created_at == func.now())
            .values(created_at=datetime.fromtimestamp(at, UTC))
        )


@pytest.fixture
def keys(api: Api) -> list[dict[str, Any]]:
    made = [_make_key(api, "violins"), _make_key(api, "cellos")]
    for key, model, at, counts in (
        (made[0], "tiny-llama", _NOON, (2, 30, 0, 8)),
        (made[0], "tiny-llama", _NOON + 30, (1, 5, 5, 1)),
        (made[0], "ft:tiny", _NOON + _HOUR, (1, 7, 0, 3)),
        (made[1], "tiny-llama", _NOON + _DAY, (4, 40, 0, 4)),
    ):
        _record(api, key, model, at, TokenCounts(*counts))
    return made


def _results(page: dict[str, Any]) -> list[tuple[int, ...]]:
    return [
        (
            bucket["start_time"],
            *(result[name] for name in ("num_model_requests", "input_tokens", "output_tokens")),
        )
        for bucket in page["data"]
        for result in bucket["results"]
    ]


def _ask(api: Api, **params: Any) -> dict[str, Any]:
    answer = api.ask("GET", "/organization/usage/completions", params={"start_time": _NOON - _HOUR} | params)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_an_admin_sees_all_projects_in_buckets_of_days_hours_and_minutes(api: Api, keys: list[Any]) -> None:
    midnight = _NOON - _NOON % _DAY
    assert _results(_ask(api)) == [(midnight, 4, 42, 12), (midnight + _DAY, 4, 40, 4)]
    hours = _ask(api, bucket_width="1h", end_time=_NOON + 2 * _HOUR)
    assert [bucket["start_time"] for bucket in hours["data"]] == [_NOON - _HOUR, _NOON, _NOON + _HOUR]
    assert _results(hours) == [(_NOON, 3, 35, 9), (_NOON + _HOUR, 1, 7, 3)]
    minutes = _ask(api, bucket_width="1m", start_time=_NOON, end_time=_NOON + 60)
    assert _results(minutes) == [(_NOON, 3, 35, 9)]
    assert minutes["data"][0]["results"][0]["input_cached_tokens"] == 5


def test_usage_is_grouped_and_filtered_by_project_key_and_model(api: Api, keys: list[Any]) -> None:
    page = _ask(api, group_by=["project_id", "model"])
    found = {
        (one["project_id"], one["model"], one["api_key_id"]) for b in page["data"] for one in b["results"]
    }
    first, second = (key["project_id"] for key in keys)
    assert found == {(first, "tiny-llama", None), (first, "ft:tiny", None), (second, "tiny-llama", None)}
    by_key = _ask(api, group_by="api_key_id", models="tiny-llama")
    assert [one["api_key_id"] for b in by_key["data"] for one in b["results"]] == [key["id"] for key in keys]
    assert _results(_ask(api, project_ids=second)) == _results(_ask(api, api_key_ids=keys[1]["id"]))


def test_a_key_that_is_no_admin_sees_its_own_project_alone(api: Api, keys: list[Any]) -> None:
    headers = {"Authorization": f"Bearer {keys[1]['key']}"}
    path = "/organization/usage/completions"
    page = api.ask("GET", path, headers=headers, params={"start_time": 0}).json()
    assert page["data"][0]["results"] == []
    params = {"start_time": _NOON, "group_by": "project_id"}
    page = api.ask("GET", path, headers=headers, params=params).json()
    assert [one["project_id"] for b in page["data"] for one in b["results"]] == [keys[1]["project_id"]]


def test_pages_follow_each_other_until_now(api: Api, keys: list[Any]) -> None:
    whole = _results(_ask(api, bucket_width="1h", limit=168))
    found: list[Any] = []
    page = _ask(api, bucket_width="1h", limit=10)
    for _ in range(3):
        assert page["has_more"]
        assert len(page["data"]) == 10
        found += _results(page)
        page = _ask(api, bucket_width="1h", limit=10, page=page["next_page"])
    assert found + _results(page) == whole
    last = _ask(api, start_time=_NOON, end_time=_NOON + 1)
    assert (last["has_more"], last["next_page"]) == (False, None)
    assert _ask(api, start_time=2**32)["data"] == []


@pytest.mark.parametrize(
    ("params", "param"),
    [
        ({"start_time": None}, "start_time"),
        ({"bucket_width": "1w"}, "bucket_width"),
        ({"group_by": "user"}, "group_by.0"),
        ({"limit": 32}, "limit"),
        ({"end_time": _NOON - _DAY}, "end_time"),
        ({"page": "page_1"}, "page"),
        ({"page": "x" * 100}, "page"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_a_bad_question_names_its_field(api: Api, params: dict[str, Any], param: str) -> None:
    query = {k: v for k, v in ({"start_time": _NOON} | params).items() if v is not None}
    answer = api.ask("GET", "/organization/usage/completions", params=query)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


def test_the_sdk_and_the_command_line_read_it(api: Api, keys: list[Any]) -> None:
    sdk = openai.OpenAI(
        base_url=f"{api.base_url}/v1", admin_api_key=api.key, _strict_response_validation=True
    )
    page = sdk.admin.organization.usage.completions(start_time=_NOON, group_by=["model", "api_key_id"])
    assert sum(len(bucket.results) for bucket in page.data) == 3

    def printed(key: str, *options: str) -> str:
        command = [sys.executable, "-m", "luthier.cli.main", "usage", "--days", "60", *options]
        command += ["--base-url", f"{api.base_url}/v1", "--api-key", key]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    owners = [[f"{key['project']} ({key['project_id']})", f"{key['name']} ({key['id']})"] for key in keys]
    assert [re.split(r" {2,}", line)[1:] for line in printed(api.key).splitlines()[1:]] == [
        [*owners[0], "ft:tiny", "1", "7", "0", "3"],
        [*owners[0], "tiny-llama", "3", "35", "5", "9"],
        [*owners[1], "tiny-llama", "4", "40", "0", "4"],
    ]
    assert sum(len(bucket["results"]) for bucket in json.loads(printed(api.key, "--json"))) == 3
    # Only an admin key may read names.
    assert printed(keys[0]["key"]).splitlines()[1].split()[1:3] == [keys[0]["project_id"], keys[0]["id"]]


def test_each_request_is_logged_without_text_of_users(api: Api, capfd: pytest.CaptureFixture[str]) -> None:
    api.ask("GET", "/files/file-secret?after=secret")
    answer = api.ask("GET", "/models/a%2Fsecret")
    httpx2.get(f"{api.base_url}/secret/path")
    output = ""

    def is_logged() -> bool:
        nonlocal output
        output += capfd.readouterr().out
        return output.count('"event":"request"') >= 3

    # A line is written once its answer is out.
    wait_until(is_logged, what="three requests are logged")
    lines = [json.loads(line) for line in output.splitlines() if '"event":"request"' in line]
    assert [(line["route"], line["status"], line["is_complete"]) for line in lines] == [
        ("/v1/files/{file_id}", 400, True),
        ("/v1/models/{model}", 404, True),
        (None, 404, True),
    ]
    assert lines[1]["request_id"] == answer.headers["x-request-id"]
    key = api.ask("GET", "/keys").json()["data"][0]
    assert (lines[1]["key_id"], lines[1]["project_id"]) == (key["id"], key["project_id"])
    assert lines[2]["key_id"] is None
    assert all(line["duration_seconds"] >= 0 for line in lines)
    assert "secret" not in output


def test_usage_that_could_not_be_stored_is_stored_later(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.metrics._FLUSH_SECONDS", 0.05)
    key = _make_key(api, "violas")
    database, num_failures = api.state.database, 0
    record = usage.record

    def fail(session: Any, counts: Any) -> None:
        nonlocal num_failures
        num_failures += 1
        session.execute(text("SELECT no_such_column FROM usage_events"))

    with database.transaction() as session:
        organization_id = session.scalars(select(Organization.id)).one()
    monkeypatch.setattr(usage, "record", fail)
    owner = UsageOwner(organization_id, key["project_id"], key["id"], "tiny-llama")
    api.state.usage.add(owner, TokenCounts(1, 2, 0, 3))
    wait_until(lambda: num_failures > 0)
    monkeypatch.setattr(usage, "record", record)

    def is_stored() -> bool:
        with database.transaction() as session:
            stored = session.scalars(select(UsageEvent).where(UsageEvent.project_id == key["project_id"]))
            return [event.model for event in stored] == ["tiny-llama"]

    wait_until(is_stored)
