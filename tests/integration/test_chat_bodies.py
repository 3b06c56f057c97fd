"""Bodies of requests for answers: read for known keys alone, within a budget, parsed for one name."""

import json
import socket
import tracemalloc
from collections.abc import Iterator
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

import httpx2
import pytest

from api.concurrency import BodyBudget
from luthier.core.errors import UnavailableError
from luthier.core.ids import new_api_key
from luthier.core.settings import MIB
from tests.conftest import TINY_BASE, Api, ProjectClient, wait_until

pytestmark = pytest.mark.shared_api
PATHS = ["/v1/chat/completions", "/v1/completions", "/v1/responses"]
LARGE = 8 * MIB


def body_of(num_bytes: int) -> bytes:
    start = json.dumps({"model": TINY_BASE, "prompt": ""}).encode()[:-2]
    return start + b"a" * (num_bytes - len(start) - 2) + b'"}'


@contextmanager
def open_request(api: Api, path: str, key: str, length: int | None) -> Iterator[socket.socket]:
    """Send the head of a request whose body is still to come."""
    parts = urlsplit(api.base_url)
    framing = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    head = f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\n{framing}\r\n\r\n"
    with closing(socket.create_connection((parts.hostname, parts.port), timeout=20)) as connection:
        connection.sendall(head.encode())
        yield connection


def status_of(connection: socket.socket) -> int:
    return int(connection.recv(65536).split()[1])


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("key", "length", "status"),
    [
        (new_api_key(), LARGE, 401),
        (new_api_key(), None, 401),
        ("malformed", 100, 401),
        (None, LARGE + 1, 413),
    ],
    ids=["unknown key", "unknown key in chunks", "malformed key", "too large"],
)
def test_a_request_is_refused_by_its_head_before_its_body_has_come(
    api: Api, path: str, key: str | None, length: int | None, status: int
) -> None:
    with open_request(api, path, key or api.key, length) as connection:
        assert status_of(connection) == status


@pytest.mark.parametrize("path", ["/v1/keys", "/v1/fine_tuning/jobs", "/v1/nowhere"])
def test_any_routes_body_is_read_no_further_than_its_key_allows(api: Api, path: str) -> None:
    with open_request(api, path, new_api_key(), 200_000) as connection:
        connection.sendall(b" " * 20_000)
        assert status_of(connection) == 401
    with open_request(api, path, api.key, 300_000) as connection:
        connection.sendall(b" " * 280_000)
        assert status_of(connection) == 413


@pytest.mark.parametrize("path", PATHS)
def test_a_large_body_of_a_known_key_is_passed_on_as_it_came(api: Api, path: str) -> None:
    body = body_of(LARGE)
    assert api.http.post(path, content=body, headers=api.headers).status_code == 200
    assert api.backend.asked[-1][:2] == (path, body)


def test_large_bodies_hold_bounded_memory_and_small_ones_are_read_all_the_while(api: Api) -> None:
    other, budget = api.other_project(), api.state.bodies
    object.__setattr__(api.state, "bodies", BodyBudget(8 * MIB))
    half = body_of(5 * MIB)[: 3 * MIB]

    def post(project: ProjectClient, num_bytes: int) -> httpx2.Response:
        return project.ask("POST", "/completions", content=body_of(num_bytes))

    try:
        with open_request(api, PATHS[0], api.key, 5 * MIB) as first:
            first.sendall(half)
            wait_until(lambda: sum(api.state.bodies._held.values()) == 3 * MIB, what="the first half")
            # Half of the budget is a project's, so that no project takes it from the others.
            refused = post(api, 2 * MIB)
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
            assert int(refused.headers["retry-after"]) >= 1
            assert post(other, 2 * MIB).status_code == 200
            assert post(api, 1000).status_code == 200
            with open_request(api, PATHS[0], other.key, 4 * MIB) as second:
                second.sendall(half)
                wait_until(lambda: sum(api.state.bodies._held.values()) == 6 * MIB, what="the second half")
        wait_until(lambda: not api.state.bodies._held, what="clients that left hold nothing")
        assert post(api, 4 * MIB - 1).status_code == 200
        assert not api.state.bodies._held
    finally:
        object.__setattr__(api.state, "bodies", budget)


def test_all_projects_together_are_refused_with_503_beyond_the_budget() -> None:
    budget = BodyBudget(8 * MIB)
    with budget.hold("a") as a, budget.hold("b") as b, budget.hold("c") as c:
        a(4 * MIB)
        b(3 * MIB)
        with pytest.raises(UnavailableError):
            c(2 * MIB)
        c(1 * MIB)
    with budget.hold("c") as c:
        c(4 * MIB)


def test_the_name_is_found_without_building_the_rest_of_a_large_body(api: Api) -> None:
    body = b'{"metadata": [' + b"0," * (2 * MIB) + b'0], "model": "%b", "prompt": "a"}' % TINY_BASE.encode()
    tracemalloc.start()
    try:
        api.ok("POST", "/completions", content=body)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # The client's copy, the chunks, and the joined body; a list of two million numbers is 16 MiB more.
    assert peak < 4 * len(body), f"{peak / len(body):.1f}"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "invalid_request"),
        (b"[]", "invalid_type"),
        (b'{"model": 3}', "invalid_type"),
        (b'{"model": {"a": []}}', "invalid_type"),
        (b'{"model": null}', "missing_required_parameter"),
        (b"{}", "missing_required_parameter"),
        (b'{"model": "\\ud800"}', "invalid_request"),
        (b'{"a": ' + b"[" * 100_000, "invalid_request"),
    ],
)
def test_a_body_without_a_name_is_refused_by_what_is_wrong_with_it(api: Api, body: bytes, code: str) -> None:
    for path in PATHS:
        assert api.refused("POST", path.removeprefix("/v1"), content=body)[:2] == (400, code)
