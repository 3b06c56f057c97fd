"""Keys and projects: who may see what."""

from datetime import datetime, timedelta
from typing import Any

import httpx2
import openai
import pytest
from sqlalchemy import event

from db.tables import ApiKey
from tests.conftest import Api
from tests.rows import colour_rows, jsonl


def _make_key(api: Api, **body: object) -> dict[str, str]:
    answer = httpx2.post(f"{api.base_url}/v1/keys", headers=api.headers, json=body)
    assert answer.status_code == 200, answer.text
    made: dict[str, str] = answer.json()
    return made


def test_a_request_without_a_good_key_is_401(api: Api) -> None:
    for headers in (
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer lt_nope"},
        {"Authorization": f"Basic {api.key}"},
        {"Authorization": f"Bearer {api.key[:-1]}{chr(97 + (api.key[-1] == chr(97)))}"},
    ):
        for method, path in (
            ("GET", "/v1/models"),
            ("GET", "/v1/files"),
            ("POST", "/v1/files"),
            ("POST", "/v1/fine_tuning/jobs"),
            ("GET", "/v1/fine_tuning/methods"),
            ("POST", "/v1/chat/completions"),
            ("POST", "/v1/responses"),
            ("GET", "/v1/keys"),
        ):
            answer = httpx2.request(method, api.base_url + path, headers=headers, json={"model": "x"})
            assert answer.status_code == 401, (path, answer.text)
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["x-request-id"].startswith("req_")


def test_a_key_is_shown_once_stored_as_a_hash_and_useless_once_revoked(api: Api) -> None:
    made = _make_key(api, name="ci")
    listed = httpx2.get(f"{api.base_url}/v1/keys", headers=api.headers)
    assert made["key"] not in listed.text
    assert made["prefix"] in listed.text
    with api.state.database.engine.connect() as connection:
        dump = str(connection.exec_driver_sql("SELECT * FROM api_keys").all())
    assert made["key"] not in dump
    headers = {"Authorization": f"Bearer {made['key']}"}
    assert httpx2.get(f"{api.base_url}/v1/files", headers=headers).status_code == 200
    revoked = httpx2.delete(f"{api.base_url}/v1/keys/{made['id']}", headers=api.headers)
    assert revoked.json() == {"id": made["id"], "object": "api_key", "deleted": True}
    assert httpx2.get(f"{api.base_url}/v1/files", headers=headers).status_code == 401


def test_when_a_key_was_last_used_is_reported_to_the_minute(api: Api) -> None:
    made = _make_key(api, name="ci")
    headers = {"Authorization": f"Bearer {made['key']}"}

    def use() -> datetime | None:
        assert httpx2.get(f"{api.base_url}/v1/files", headers=headers).status_code == 200
        with api.state.database.transaction() as session:
            return session.get_one(ApiKey, made["id"]).last_used_at

    first = use()
    assert first is not None
    statements: list[str] = []
    engine = api.state.database.engine

    def note(*reported: Any) -> None:
        statements.append(reported[2])

    event.listen(engine, "before_cursor_execute", note)
    assert use() == first
    event.remove(engine, "before_cursor_execute", note)
    assert any("api_keys" in one for one in statements)
    assert not [one for one in statements if one.startswith("UPDATE api_keys")]
    with api.state.database.transaction() as session:
        session.get_one(ApiKey, made["id"]).last_used_at = first - timedelta(seconds=61)
    assert (use() or first) > first


def test_only_an_admin_key_manages_keys(api: Api) -> None:
    made = _make_key(api, name="plain")
    headers = {"Authorization": f"Bearer {made['key']}"}
    for method, path in (("GET", "/v1/keys"), ("POST", "/v1/keys"), ("DELETE", f"/v1/keys/{made['id']}")):
        answer = httpx2.request(method, api.base_url + path, headers=headers, json={"name": "more"})
        assert answer.status_code == 403, answer.text


def test_keys_are_reported_with_the_names_of_their_projects(api: Api) -> None:
    made = _make_key(api, name="second", project="violins")
    assert made["project"] == "violins"
    listed = httpx2.get(f"{api.base_url}/v1/keys", headers=api.headers).json()["data"]
    assert {key["id"]: key["project"] for key in listed}[made["id"]] == "violins"
    assert len({key["project"] for key in listed}) == 2


def test_another_projects_ids_are_404_everywhere(api: Api) -> None:
    mine = openai.OpenAI(base_url=f"{api.base_url}/v1", api_key=api.key, max_retries=0)
    file = mine.files.create(file=("rows.jsonl", jsonl(colour_rows())), purpose="fine-tune")
    job = mine.fine_tuning.jobs.create(model="tiny-llama", training_file=file.id)
    other_key = _make_key(api, name="other", project="other")["key"]
    headers = {"Authorization": f"Bearer {other_key}"}
    jobs = f"/v1/fine_tuning/jobs/{job.id}"
    for method, path in (
        ("GET", f"/v1/files/{file.id}"),
        ("GET", f"/v1/files/{file.id}/content"),
        ("DELETE", f"/v1/files/{file.id}"),
        ("GET", jobs),
        ("POST", f"{jobs}/cancel"),
        ("GET", f"{jobs}/events"),
        ("GET", f"{jobs}/events?stream=true"),
        ("GET", f"{jobs}/checkpoints"),
        ("GET", f"{jobs}/report"),
    ):
        theirs = httpx2.request(method, api.base_url + path, headers=headers)
        unknown = path.replace(file.id, "file-unknown").replace(job.id, "ftjob-unknown")
        nobodys = httpx2.request(method, api.base_url + unknown, headers=headers)
        assert theirs.status_code == nobodys.status_code == 404, (path, theirs.text)
        same = theirs.text.replace(file.id, "file-unknown").replace(job.id, "ftjob-unknown")
        assert same == nobodys.text
    other = openai.OpenAI(base_url=f"{api.base_url}/v1", api_key=other_key, max_retries=0)
    assert other.files.list().data == []
    assert other.fine_tuning.jobs.list().data == []
    with pytest.raises(openai.BadRequestError) as caught:
        other.fine_tuning.jobs.create(model="tiny-llama", training_file=file.id)
    assert caught.value.param == "training_file"
    assert mine.files.retrieve(file.id).id == file.id
