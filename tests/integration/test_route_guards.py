"""Every route asks for a key, also one that is added later."""

import re
from collections.abc import Iterator

import httpx2
from fastapi.dependencies.models import Dependant
from fastapi.routing import RouteContext, iter_route_contexts

from api.deps import authenticate, get_principal
from api.main import create_app
from tests.conftest import Api

# Probes, documents and the page that says what this is: nothing of a project is in them.
_OPEN = {"/", "/docs", "/docs/{name}", "/healthz", "/readyz", "/openapi.json"}
# They look the key up together with the model's name; metrics have a token of their own.
_OWN_GUARD = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/metrics"}


def _calls(dependant: Dependant) -> Iterator[object]:
    for inner in dependant.dependencies:
        yield inner.call
        yield from _calls(inner)


def _routes(api: Api) -> list[RouteContext]:
    found = [*iter_route_contexts(create_app(api.state).routes)]
    assert len(found) > 50
    return found


def test_every_route_depends_on_a_guard_but_the_named_ones(api: Api) -> None:
    for route in _routes(api):
        if route.path not in _OPEN | _OWN_GUARD:
            assert {get_principal, authenticate} & set(_calls(route.dependant)), route.path


def test_every_path_without_a_key_is_401_but_the_open_ones(api: Api) -> None:
    for route in _routes(api):
        assert route.path is not None
        assert route.methods
        for method in route.methods:
            url = api.base_url + re.sub(r"\{[^}]*\}", "x", route.path)
            answer = httpx2.request(method, url, json={} if method in {"POST", "PUT", "PATCH"} else None)
            assert (answer.status_code == 401) != (route.path in _OPEN), (method, url, answer.text)
