"""Keys and projects: who may see what."""

from datetime import datetime, timedelta
from typing import Any

from db.tables import ApiKey
from tests.conftest import TINY_BASE, Api, ProjectClient
from tests.statements import counted


def _make_key(api: Api, **body: object) -> dict[str, Any]:
    return api.ok("POST", "/keys", body)


def test_a_request_without_a_good_key_is_401(api: Api) -> None:
    for authorization in (
        "",
        "Bearer",
        "Bearer lt_nope",
        f"Basic {api.key}",
        f"Bearer {api.key[:-1]}{chr(97 + (api.key[-1] == chr(97)))}",
    ):
        # One route of each guard; test_route_guards.py has all of them without a key.
        for method, path in (("GET", "/models"), ("POST", "/files"), ("POST", "/responses")):
            headers = {"Authorization": authorization}
            answer = api.ask(method, path, {"model": "x"}, headers=headers)
            assert answer.status_code == 401, (path, answer.text)
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert answer.headers["x-request-id"].startswith("req_")


def test_a_key_is_shown_once_stored_as_a_hash_and_useless_once_revoked(api: Api) -> None:
    made = _make_key(api, name="ci")
    listed = api.ask("GET", "/keys").text
    assert made["key"] not in listed
    assert made["prefix"] in listed
    with api.state.database.engine.connect() as connection:
        dump = str(connection.exec_driver_sql("SELECT * FROM api_keys").all())
    assert made["key"] not in dump
    plain = ProjectClient(api.http, made["key"])
    assert plain.ok("GET", "/files")
    assert api.ok("DELETE", f"/keys/{made['id']}") == {"id": made["id"], "object": "api_key", "deleted": True}
    assert plain.refused("GET", "/files")[0] == 401


def test_when_a_key_was_last_used_is_reported_to_the_minute(api: Api) -> None:
    made, database = _make_key(api, name="ci"), api.state.database
    plain = ProjectClient(api.http, made["key"])

    def use() -> datetime | None:
        plain.ok("GET", "/files")
        with database.transaction() as session:
            return session.get_one(ApiKey, made["id"]).last_used_at

    first = use()
    assert first is not None
    with counted(database) as statements:
        assert use() == first
    assert any("api_keys" in one for one in statements)
    assert not [one for one in statements if one.startswith("UPDATE api_keys")]
    with database.transaction() as session:
        session.get_one(ApiKey, made["id"]).last_used_at = first - timedelta(seconds=61)
    assert (use() or first) > first


def test_only_an_admin_key_manages_keys(api: Api) -> None:
    made = _make_key(api, name="plain")
    plain = ProjectClient(api.http, made["key"])
    for method, path in (("GET", "/keys"), ("POST", "/keys"), ("DELETE", f"/keys/{made['id']}")):
        assert plain.refused(method, path, {"name": "more"})[0] == 403


def test_keys_are_reported_with_the_names_of_their_projects(api: Api) -> None:
    made = _make_key(api, name="second", project="violins")
    assert made["project"] == "violins"
    listed = api.ok("GET", "/keys")["data"]
    assert {key["id"]: key["project"] for key in listed}[made["id"]] == "violins"
    assert len({key["project"] for key in listed}) == 2


def test_another_projects_ids_are_404_everywhere(api: Api, file_id: str) -> None:
    declared = {"bytes": 9, "filename": "a", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    hook = {"name": "n", "url": "https://hooks.example/", "event_types": ["fine_tuning.job.failed"]}
    job_id = api.create_job(file_id)["id"]
    upload_id = api.ok("POST", "/uploads", declared)["id"]
    hook_id = api.ok("POST", "/webhook_endpoints", hook)["id"]
    file, job, upload = f"/files/{file_id}", f"/fine_tuning/jobs/{job_id}", f"/uploads/{upload_id}"
    endpoint, other = f"/webhook_endpoints/{hook_id}", api.other_project()
    for method, path, options in (
        ("GET", file, {}),
        ("GET", f"{file}/content", {}),
        ("DELETE", file, {}),
        ("GET", job, {}),
        ("POST", f"{job}/cancel", {}),
        ("GET", f"{job}/events", {}),
        ("GET", f"{job}/events?stream=true", {}),
        ("GET", f"{job}/checkpoints", {}),
        ("GET", f"{job}/report", {}),
        ("GET", upload, {}),
        ("POST", f"{upload}/parts", {"files": {"data": ("upload", b"x")}}),
        ("POST", f"{upload}/complete", {"body": {"part_ids": ["part_1"]}}),
        ("POST", f"{upload}/cancel", {}),
        ("GET", endpoint, {}),
        ("POST", endpoint, {"body": {"name": "x"}}),
        ("DELETE", endpoint, {}),
        ("POST", f"{endpoint}/rotate_secret", {}),
        ("POST", f"{endpoint}/test", {"body": {"event_type": "fine_tuning.job.failed"}}),
    ):
        owner_id = next(one for one in (file_id, job_id, upload_id, hook_id) if one in path)
        theirs = other.ask(method, path, **options)
        unknown = other.ask(method, path.replace(owner_id, "unknown"), **options)
        assert theirs.status_code == unknown.status_code == 404, (path, theirs.text)
        assert theirs.text.replace(owner_id, "unknown") == unknown.text
    for listed in ("/files", "/fine_tuning/jobs", "/webhook_endpoints"):
        assert other.ok("GET", listed)["data"] == []
    for create in ("/fine_tuning/jobs", "/fine_tuning/jobs/estimate"):
        body = {"model": TINY_BASE, "training_file": file_id}
        assert other.refused("POST", create, body)[2] == "training_file"
    assert api.ok("GET", file)["id"] == file_id
    assert api.ok("GET", upload)["status"] == "pending"
    assert api.ok("GET", endpoint)["name"] == "n"
