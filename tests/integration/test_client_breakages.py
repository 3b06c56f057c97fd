"""What real clients of the jobs surface break on if a server is sloppy: a test for each such sentence.

The numbers are those of the list that the project keeps. Sentences that are held elsewhere:

    10, 11  test_api_jobs.py: the one shape, also of unknown routes (and here, of stranger requests)
    12, 13  tests/unit/api/test_errors.py: no permanent refusal that is repeated, short waits
    14      test_retries.py: creates that come twice
    17, 40  test_api_jobs.py: all three configurations of `method`; integrations
    18-24, 43  test_client_breakages_states.py: jobs in every status, and their ids
    42      test_job_life.py: trained_tokens after success
"""

import json
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import pytest
import structlog

from api.schemas.jobs import IGNORED_JOB_FIELDS
from db.session import Database
from db.tables import Job
from luthier.core.settings import Settings
from tests.conftest import Api, serve_api
from tests.integration.wire import ask, create_job
from tests.rows import colour_rows, jsonl

_SHAPE = {"message", "type", "param", "code"}


@pytest.fixture(scope="module")
def api(module_api: Api) -> Api:
    return module_api


@pytest.fixture(scope="module")
def client(api: Api) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{api.base_url}/v1", api_key=api.key, max_retries=0)


@pytest.fixture(scope="module")
def file_id(client: openai.OpenAI) -> str:
    return client.files.create(file=("rows.jsonl", jsonl(colour_rows())), purpose="fine-tune").id


def test_a_post_with_json_content_type_and_no_body_is_no_parse_error(api: Api, file_id: str) -> None:
    job_id = create_job(api, file_id)["id"]
    headers = {"Content-Type": "application/json", "Content-Length": "0"}
    for verb, code in (("pause", "invalid_job_state"), ("resume", "invalid_job_state"), ("cancel", None)):
        answer = ask(api, "POST", f"/fine_tuning/jobs/{job_id}/{verb}", headers=headers, content=b"")
        assert (answer.json()["error"] or {}).get("code") == code
        assert answer.status_code == (200 if code is None else 400)


def test_lists_say_has_more_exactly_and_begin_with_the_newest(
    api: Api, client: openai.OpenAI, file_id: str
) -> None:
    made = [create_job(api, file_id, metadata={"batch": "six"})["id"] for _ in range(4)]
    query = {"metadata[batch]": "six"}
    for limit, has_more in ((3, True), (4, False), (5, False)):
        page = ask(api, "GET", "/fine_tuning/jobs", params=query | {"limit": str(limit)}).json()
        assert [job["id"] for job in page["data"]] == made[::-1][:limit]
        assert page["has_more"] is has_more
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"batch": "six"}, limit=1)] == made[::-1]
    seconds = [event.created_at for event in client.fine_tuning.jobs.list_events(made[0], limit=1)]
    assert len(seconds) == 2
    for path in (f"/{made[0]}/events", f"/{made[0]}/checkpoints"):
        assert ask(api, "GET", f"/fine_tuning/jobs{path}").json()["has_more"] is False


_BAD_REQUESTS: list[tuple[str, str, dict[str, Any], int]] = [
    ("GET", "/", {}, 404),
    ("GET", "/fine_tuning", {}, 404),
    ("GET", "/fine_tuning/jobs/", {}, 404),
    ("POST", "/fine-tunes", {"json": {}}, 404),
    ("DELETE", "/fine_tuning/jobs", {}, 405),
    ("PATCH", "/fine_tuning/jobs/ftjob-1", {"json": {}}, 405),
    ("GET", "/fine_tuning/jobs/ftjob-1/cancel", {}, 405),
    ("GET", "/fine_tuning/jobs/ftjob-1", {}, 404),
    ("POST", "/fine_tuning/jobs/ftjob-1/pause", {}, 404),
    ("POST", "/fine_tuning/jobs", {"content": b""}, 400),
    ("POST", "/fine_tuning/jobs", {"content": b"{", "headers": {"Content-Type": "application/json"}}, 400),
    ("POST", "/fine_tuning/jobs", {"content": b"\xff", "headers": {"Content-Type": "application/json"}}, 400),
    ("POST", "/fine_tuning/jobs", {"json": None}, 400),
    ("POST", "/fine_tuning/jobs", {"json": "text"}, 400),
    ("POST", "/fine_tuning/jobs", {"json": [1]}, 400),
    (
        "POST",
        "/fine_tuning/jobs",
        {"content": b'{"model":"a"}', "headers": {"Content-Type": "text/plain"}},
        400,
    ),
    ("POST", "/fine_tuning/jobs", {"data": {"model": "a"}}, 400),
    (
        "POST",
        "/fine_tuning/jobs",
        {"content": b"[" * 200_000, "headers": {"Content-Type": "application/json"}},
        400,
    ),
    (
        "POST",
        "/fine_tuning/jobs",
        {
            "content": b'{"tuning":' * 100_000 + b"1" + b"}" * 100_000,
            "headers": {"Content-Type": "application/json"},
        },
        413,
    ),
    (
        "POST",
        "/fine_tuning/jobs",
        {
            "content": b'{"model":"tiny-llama","training_file":"f","tuning":'
            + b'{"a":' * 900
            + b"1"
            + b"}" * 901,
            "headers": {"Content-Type": "application/json"},
        },
        400,
    ),
    (
        "POST",
        "/fine_tuning/jobs",
        {
            "content": b'{"model":"tiny-llama","training_file":"f","training":{"max_forgetting":1e999}}',
            "headers": {"Content-Type": "application/json"},
        },
        400,
    ),
    (
        "POST",
        "/fine_tuning/jobs",
        {
            "content": b'{"model":"tiny-llama","training_file":"f","hyperparameters":{"n_epochs":NaN}}',
            "headers": {"Content-Type": "application/json"},
        },
        400,
    ),
    ("GET", "/fine_tuning/jobs?limit=x", {}, 400),
    ("GET", "/fine_tuning/jobs?after=x", {}, 400),
    ("GET", "/fine_tuning/jobs/ftjob-1/events?stream=maybe", {}, 400),
    ("GET", "/fine_tuning/jobs/ftjob-1/events?stream=true", {}, 404),
]


@pytest.mark.parametrize("number", range(len(_BAD_REQUESTS)))
def test_bad_requests_have_the_one_body_never_422_and_an_id(api: Api, number: int) -> None:
    method, path, options, status = _BAD_REQUESTS[number]
    answer = ask(api, method, path, **options)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == _SHAPE
    assert error["message"]
    assert error["code"]
    assert answer.headers["x-request-id"].startswith("req_")


def test_a_null_equals_an_absent_member_wherever_one_is_optional(api: Api, file_id: str) -> None:
    schema = httpx2.get(f"{api.base_url}/openapi.json").json()["components"]["schemas"]
    plain = {"model": "tiny-llama", "training_file": file_id}
    defaults, num_tried = create_job(api, file_id)["training"], 0
    for path in _optional_paths(schema, schema["CreateJobBody"]):
        body = json.loads(json.dumps(plain))
        inner = body
        for name in path[:-1]:
            inner = inner.setdefault(name, {"type": "supervised"} if name == "method" else {})
        inner[path[-1]] = None
        answer = ask(api, "POST", "/fine_tuning/jobs", json=body)
        assert answer.status_code == 200, (path, answer.text)
        job = answer.json()
        assert job["training"] == defaults, path
        ask(api, "POST", f"/fine_tuning/jobs/{job['id']}/cancel")
        num_tried += 1
    assert num_tried > 25
    for method in ask(api, "GET", "/fine_tuning/methods").json()["data"]:
        nulls = dict.fromkeys(set(method["parameters"]["properties"]) - {"type"})
        job = create_job(api, file_id, tuning={"type": method["id"]} | nulls)
        assert job["tuning"] == create_job(api, file_id, tuning={"type": method["id"]})["tuning"]


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


def test_top_level_hyperparameters_are_accepted_and_mirrored(api: Api, file_id: str) -> None:
    job = create_job(api, file_id, hyperparameters={"n_epochs": 2})
    assert job["hyperparameters"]["n_epochs"] == 2
    assert job["method"]["supervised"]["hyperparameters"] == job["hyperparameters"]


def test_the_three_forms_of_the_metadata_filter_differ(api: Api, file_id: str) -> None:
    filled = create_job(api, file_id, metadata={"shelf": "a", "row": "1"})["id"]
    empty = create_job(api, file_id, metadata={"shelf": ""})["id"]
    without = create_job(api, file_id, metadata=None)["id"]

    def listed(query: str) -> set[str]:
        found = ask(api, "GET", f"/fine_tuning/jobs?limit=1000&{query}").json()["data"]
        return {job["id"] for job in found} & {filled, empty, without}

    assert listed("metadata[shelf]=a") == listed("metadata%5Bshelf%5D=a") == {filled}
    assert listed("metadata[shelf]=a&metadata[row]=1") == {filled}
    assert listed("metadata[shelf]=a&metadata[row]=2") == set()
    assert listed("metadata[shelf]=") == {empty}
    assert listed("metadata=null") == {without}
    assert listed("") == {filled, empty, without}
    for query in ("metadata=null&metadata[shelf]=a", "metadata=a", "metadata[a]=1&metadata[a]=2"):
        answer = ask(api, "GET", f"/fine_tuning/jobs?{query}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "metadata")


def test_metadata_beyond_its_limits_is_400_with_its_name(api: Api, file_id: str) -> None:
    plain = {"model": "tiny-llama", "training_file": file_id}
    assert create_job(api, file_id, metadata={"k" * 64: "v" * 512})["metadata"] == {"k" * 64: "v" * 512}
    for metadata in (
        {"k" * 65: "v"},
        {"k": "v" * 513},
        {str(n): "" for n in range(17)},
        {"k": 1},
        ["k"],
        "k",
    ):
        answer = ask(api, "POST", "/fine_tuning/jobs", json=plain | {"metadata": metadata})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"].partition(".")[0] == "metadata"


def test_an_answer_to_a_fault_of_ours_has_an_id_too(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def break_down(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("services.jobs.jobs.list_", break_down)
    with structlog.testing.capture_logs() as logs:
        answer = ask(api, "GET", "/fine_tuning/jobs")
    assert [line["request_id"] for line in logs] == [answer.headers["x-request-id"]]
    assert (answer.status_code, set(answer.json()["error"])) == (500, _SHAPE)
    assert answer.headers["x-request-id"].startswith("req_")
    for path, headers in (("/models", {}), ("/models", {"Authorization": ""})):
        assert ask(api, "GET", path, headers=headers).headers["x-request-id"]


def test_a_page_of_another_origin_may_ask_with_the_sdks_headers(
    settings: Settings, database: Database
) -> None:
    allowing = settings.model_copy(update={"cors_origins": "https://other.example, https://app.example"})
    with serve_api(allowing, database) as api:
        _check_cors(api)


def test_a_page_of_an_origin_that_is_not_listed_may_not_ask(api: Api) -> None:
    answer = ask(api, "GET", "/models", headers={"Origin": "https://app.example"})
    assert "access-control-allow-origin" not in answer.headers


def _check_cors(api: Api) -> None:
    asked = "authorization,content-type,x-stainless-lang,x-stainless-retry-count"
    preflight = httpx2.request(
        "OPTIONS",
        f"{api.base_url}/v1/fine_tuning/jobs",
        headers={
            "Origin": "https://app.example",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": asked,
        },
    )
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://app.example"
    assert set(asked.split(",")) <= set(preflight.headers["access-control-allow-headers"].split(","))
    assert "POST" in preflight.headers["access-control-allow-methods"]
    assert preflight.headers["x-request-id"]
    for headers in ({}, {"Authorization": "Bearer nothing"}):
        answer = ask(api, "GET", "/fine_tuning/jobs", headers={"Origin": "https://app.example"} | headers)
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        assert "x-request-id" in answer.headers["access-control-expose-headers"].lower()
        assert "access-control-allow-credentials" not in answer.headers


def test_unknown_fields_are_refused_but_for_those_that_are_named(api: Api, file_id: str) -> None:
    job = create_job(api, file_id, **dict.fromkeys(IGNORED_JOB_FIELDS, 1))
    assert not IGNORED_JOB_FIELDS & set(job)
    plain = {"model": "tiny-llama", "training_file": file_id}
    for extra, param in (
        ({"trainingtype": 1}, "trainingtype"),
        ({"method": {"type": "supervised", "sft": {}}}, "method.sft"),
        ({"hyperparameters": {"epochs": 3}}, "hyperparameters.epochs"),
        ({"training": {"epochs": 3}}, "training.epochs"),
    ):
        answer = ask(api, "POST", "/fine_tuning/jobs", json=plain | extra)
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "unknown_parameter", param)
    with api.state.database.transaction() as session:
        assert session.get_one(Job, job["id"]).spec["training"]["max_length"] is None
