"""What real clients of the jobs surface break on if a server is sloppy: a test for each such sentence.

The numbers are those of the list that the project keeps. Sentences that are held elsewhere:

    10, 11  here: the one shape, also of unknown routes and of stranger requests
    12, 13  tests/unit/api/test_errors.py: no permanent refusal that is repeated, short waits
    14      test_retries.py: creates that come twice
    17, 40  test_api_jobs.py: all three configurations of `method`; integrations; unknown fields by name
    18-24, 43  test_client_breakages_states.py: jobs in every status, and their ids
    42      test_job_life.py: trained_tokens after success
"""

from collections.abc import Iterator
from typing import Any

import openai
import pytest
import structlog

from api.schemas.jobs import IGNORED_JOB_FIELDS
from db.session import Database
from db.tables import Job
from luthier.core.settings import Settings
from tests.conftest import Api, serve_api

pytestmark = pytest.mark.shared_api
_SHAPE = {"message", "type", "param", "code"}


def test_a_post_with_json_content_type_and_no_body_is_no_parse_error(api: Api, file_id: str) -> None:
    headers = {"Content-Type": "application/json", "Content-Length": "0"}
    job = f"/fine_tuning/jobs/{api.create_job(file_id)['id']}"
    for verb in ("pause", "resume"):
        refused = api.refused("POST", f"{job}/{verb}", content=b"", headers=headers)
        assert refused[:2] == (400, "invalid_job_state")
    declared = {"bytes": 9, "filename": "a", "mime_type": "text/jsonl", "purpose": "fine-tune"}
    for path in (job, f"/uploads/{api.ok('POST', '/uploads', declared)['id']}"):
        assert api.ok("POST", f"{path}/cancel", content=b"", headers=headers)["status"] == "cancelled"


def test_lists_say_has_more_exactly_and_begin_with_the_newest(
    api: Api, client: openai.OpenAI, file_id: str
) -> None:
    made = [api.create_job(file_id, metadata={"batch": "six"})["id"] for _ in range(4)]
    query = {"metadata[batch]": "six"}
    for limit, has_more in ((3, True), (4, False), (5, False)):
        page = api.ok("GET", "/fine_tuning/jobs", params=query | {"limit": str(limit)})
        assert [job["id"] for job in page["data"]] == made[::-1][:limit]
        assert page["has_more"] is has_more
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"batch": "six"}, limit=1)] == made[::-1]
    seconds = [event.created_at for event in client.fine_tuning.jobs.list_events(made[0], limit=1)]
    assert len(seconds) == 2
    for path in (f"/{made[0]}/events", f"/{made[0]}/checkpoints"):
        assert api.ok("GET", f"/fine_tuning/jobs{path}")["has_more"] is False


def _json(content: bytes) -> dict[str, Any]:
    return {"content": content, "headers": {"Content-Type": "application/json"}}


def _job_with(member: bytes) -> dict[str, Any]:
    return _json(b'{"model":"tiny-llama","training_file":"f",' + member + b"}")


_BAD_REQUESTS: list[tuple[str, str, dict[str, Any], int]] = [
    ("GET", "/", {}, 404),
    ("GET", "/nothing", {}, 404),
    ("GET", "/fine_tuning", {}, 404),
    ("GET", "/fine_tuning/jobs/", {}, 404),
    ("POST", "/fine-tunes", {"json": {}}, 404),
    ("GET", "/files/file-unknown", {}, 404),
    ("GET", "/uploads/upload_unknown", {}, 404),
    ("GET", "/uploads/a/b/c", {}, 404),
    ("PUT", "/files", {}, 405),
    ("DELETE", "/fine_tuning/jobs", {}, 405),
    ("PATCH", "/fine_tuning/jobs/ftjob-1", {"json": {}}, 405),
    ("GET", "/fine_tuning/jobs/ftjob-1/cancel", {}, 405),
    ("GET", "/fine_tuning/jobs/ftjob-1", {}, 404),
    ("POST", "/fine_tuning/jobs/ftjob-1/pause", {}, 404),
    ("POST", "/fine_tuning/jobs", {"content": b""}, 400),
    ("POST", "/fine_tuning/jobs", {"content": b"{"}, 400),
    ("POST", "/fine_tuning/jobs", _json(b"{"), 400),
    ("POST", "/fine_tuning/jobs", _json(b"\xff"), 400),
    ("POST", "/fine_tuning/jobs", _json(b'"text"'), 400),
    ("POST", "/fine_tuning/jobs", _json(b"[1]"), 400),
    (
        "POST",
        "/fine_tuning/jobs",
        {"content": b'{"model":"a"}', "headers": {"Content-Type": "text/plain"}},
        400,
    ),
    ("POST", "/fine_tuning/jobs", {"data": {"model": "a"}}, 400),
    ("POST", "/fine_tuning/jobs", _json(b"[" * 200_000), 400),
    ("POST", "/fine_tuning/jobs", _json(b'{"tuning":' * 100_000 + b"1" + b"}" * 100_000), 413),
    ("POST", "/fine_tuning/jobs", _job_with(b'"tuning":' + b'{"a":' * 900 + b"1" + b"}" * 900), 400),
    ("POST", "/fine_tuning/jobs", _job_with(b'"training":{"max_forgetting":1e999}'), 400),
    ("POST", "/fine_tuning/jobs", _job_with(b'"hyperparameters":{"n_epochs":NaN}'), 400),
    ("POST", "/chat/completions", {"content": b"{"}, 400),
    ("POST", "/chat/completions", {"content": b"{}"}, 400),
    ("GET", "/fine_tuning/jobs?limit=x", {}, 400),
    ("GET", "/fine_tuning/jobs?after=x", {}, 400),
    ("GET", "/fine_tuning/jobs/ftjob-1/events?stream=maybe", {}, 400),
    ("GET", "/fine_tuning/jobs/ftjob-1/events?stream=true", {}, 404),
]


@pytest.mark.parametrize("number", range(len(_BAD_REQUESTS)))
def test_bad_requests_have_the_one_body_never_422_and_an_id(api: Api, number: int) -> None:
    method, path, options, status = _BAD_REQUESTS[number]
    headers = api.headers | options.get("headers", {})
    answer = api.http.request(method, f"/v1{path}", **options | {"headers": headers})
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == _SHAPE
    assert error["message"]
    assert error["code"]
    assert answer.headers["x-request-id"].startswith("req_")


def test_a_null_equals_an_absent_member_wherever_one_is_optional(api: Api, file_id: str) -> None:
    schema = api.http.get("/openapi.json").json()["components"]["schemas"]
    defaults, num_tried = api.create_job(file_id)["training"], 0
    for path in _optional_paths(schema, schema["CreateJobBody"]):
        body: dict[str, Any] = {}
        inner = body
        for name in path[:-1]:
            inner = inner.setdefault(name, {"type": "supervised"} if name == "method" else {})
        inner[path[-1]] = None
        job = api.create_job(file_id, **body)
        assert job["training"] == defaults, path
        api.ask("POST", f"/fine_tuning/jobs/{job['id']}/cancel")
        num_tried += 1
    assert num_tried > 25
    for method in api.ok("GET", "/fine_tuning/methods")["data"]:
        nulls = dict.fromkeys(set(method["parameters"]["properties"]) - {"type"})
        job = api.create_job(file_id, tuning={"type": method["id"]} | nulls)
        assert job["tuning"] == api.create_job(file_id, tuning={"type": method["id"]})["tuning"]


def _optional_paths(
    schemas: dict[str, Any], schema: dict[str, Any], depth: int = 0
) -> Iterator[tuple[str, ...]]:
    """Yield the path of every member that a schema does not require, objects inside of objects included."""
    for name, member in schema["properties"].items():
        if name not in schema.get("required", ()):
            yield (name,)
        for choice in (member, *member.get("anyOf", ())):
            if "$ref" in choice:
                inner = schemas[choice["$ref"].rpartition("/")[2]]
                for path in _optional_paths(schemas, inner, depth + 1):
                    yield (name, *path)


def test_the_three_forms_of_the_metadata_filter_differ(api: Api, file_id: str) -> None:
    filled = api.create_job(file_id, metadata={"shelf": "a", "row": "1"})["id"]
    empty = api.create_job(file_id, metadata={"shelf": ""})["id"]
    without = api.create_job(file_id, metadata=None)["id"]

    def listed(query: str) -> set[str]:
        found = api.ok("GET", f"/fine_tuning/jobs?limit=1000&{query}")["data"]
        return {job["id"] for job in found} & {filled, empty, without}

    assert listed("metadata[shelf]=a") == listed("metadata%5Bshelf%5D=a") == {filled}
    assert listed("metadata[shelf]=a&metadata[row]=1") == {filled}
    assert listed("metadata[shelf]=a&metadata[row]=2") == set()
    assert listed("metadata[shelf]=") == {empty}
    assert listed("metadata=null") == {without}
    assert listed("") == {filled, empty, without}
    for query in ("metadata=null&metadata[shelf]=a", "metadata=a", "metadata[a]=1&metadata[a]=2"):
        refused = api.refused("GET", f"/fine_tuning/jobs?{query}")
        assert (refused[0], refused[2]) == (400, "metadata")


def test_metadata_may_be_as_long_as_its_limits(api: Api, file_id: str) -> None:
    longest = {"k" * 64: "v" * 512}
    assert api.create_job(file_id, metadata=longest)["metadata"] == longest


def test_an_answer_to_a_fault_of_ours_has_an_id_too(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("services.jobs.jobs.list_", break_down)
    with structlog.testing.capture_logs() as logs:
        # As the server does after a fault.
        answer = api.ask("GET", "/fine_tuning/jobs", headers={"Connection": "close"})
    assert [line["request_id"] for line in logs] == [answer.headers["x-request-id"]]
    assert (answer.status_code, set(answer.json()["error"])) == (500, _SHAPE)
    assert answer.headers["x-request-id"].startswith("req_")
    for path, headers in (("/models", {}), ("/models", {"Authorization": ""})):
        assert api.ask("GET", path, headers=headers).headers["x-request-id"]


def test_a_page_of_another_origin_may_ask_with_the_sdks_headers(
    settings: Settings, database: Database
) -> None:
    allowing = settings.model_copy(update={"cors_origins": "https://other.example, https://app.example"})
    with serve_api(allowing, database) as api:
        _check_cors(api)


def test_a_page_of_an_origin_that_is_not_listed_may_not_ask(api: Api) -> None:
    answer = api.ask("GET", "/models", headers={"Origin": "https://app.example"})
    assert "access-control-allow-origin" not in answer.headers


def _check_cors(api: Api) -> None:
    asked = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"
    headers = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
    headers |= {"Access-Control-Request-Headers": asked}
    preflight = api.http.request("OPTIONS", "/v1/fine_tuning/jobs", headers=headers)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    assert set(asked.split(",")) <= set(preflight.headers["access-control-allow-headers"].split(","))
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert preflight.headers["x-request-id"]
    for headers in ({}, {"Authorization": "Bearer nothing"}):
        answer = api.ask("GET", "/fine_tuning/jobs", headers={"Origin": "https://app.example"} | headers)
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()
        assert "access-control-allow-credentials" not in answer.headers


def test_fields_of_openai_that_mean_nothing_here_are_ignored(api: Api, file_id: str) -> None:
    job = api.create_job(file_id, **dict.fromkeys(IGNORED_JOB_FIELDS, 1))
    assert not IGNORED_JOB_FIELDS & set(job)
    with api.state.database.transaction() as session:
        assert session.get_one(Job, job["id"]).spec["training"]["max_length"] is None
