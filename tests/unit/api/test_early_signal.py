"""A signal that comes before the API has started stops it all the same."""

import signal
from types import SimpleNamespace
from typing import Any

import uvicorn

from api.__main__ import _Server


def test_a_signal_before_the_start_stops_the_server():
    closed: list[bool] = []
    parts: Any = SimpleNamespace(hub=SimpleNamespace(close_streams=lambda: closed.append(True)))

    async def app(*_: Any) -> None:
        raise AssertionError("nobody asks")

    server = _Server(uvicorn.Config(app, log_config=None), parts)
    server.handle_exit(signal.SIGTERM, None)
    assert server.should_exit
    assert closed == [True]
