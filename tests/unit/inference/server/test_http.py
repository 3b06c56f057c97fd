"""Faults on their way out: logged once, by kind and place, and never by their text."""

import asyncio
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from luthier.inference.server.app import EXCEPTION_HANDLERS, FaultGate

SECRET = "swordfish"


def get(app: Any, path: str) -> list[dict[str, Any]]:
    """Return what an app sends for a request, as a web server sees it."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        # The client sends nothing more and stays.
        await asyncio.Event().wait()
        raise AssertionError

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b""}
    asyncio.run(app(scope, receive, send))
    return sent


async def fail(request: Request) -> Response:
    raise RuntimeError(SECRET + request.url.path)


async def fail_within(_request: Request) -> Response:
    async def events() -> Any:
        yield b"data: 1"
        raise RuntimeError(SECRET)

    return StreamingResponse(events())


@pytest.mark.parametrize("path", ["/whole", "/stream"])
def test_a_fault_is_logged_once_by_kind_and_place_and_ends_its_request_alone(path, caplog):
    routes = [Route("/whole", fail), Route("/stream", fail_within)]
    app = FaultGate(Starlette(routes=routes, exception_handlers=EXCEPTION_HANDLERS))
    sent = get(app, path)
    assert sent[0]["status"] == (500 if path == "/whole" else 200)
    # A stream that broke off is not ended in good order, so that no client takes it for whole.
    assert sent[-1].get("more_body", False) is (path == "/stream")
    assert len(caplog.records) == 1
    assert "RuntimeError" in caplog.text and SECRET not in caplog.text


def test_a_fault_without_an_answer_is_logged_too(caplog):
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise OSError(SECRET)

    assert get(FaultGate(broken), "/") == []
    assert "OSError" in caplog.text and SECRET not in caplog.text
