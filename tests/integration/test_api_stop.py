"""A stop of the API: what lasts longer than it waits ends with an error in OpenAI's shape."""

import json
import signal
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest

from db.session import Database
from luthier.core.settings import Settings
from tests.conftest import Api, wait_until
from tests.tiny import BASE_ID
from tests.workers import running_api

_STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"transfer-encoding: chunked\r\n\r\na\r\ndata: {}\n\n\r\n"
)


class _Silent:
    """An inference server that begins streams and never ends anything."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self.num_asked = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=self._talk, args=(self._listener.accept()[0],), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with suppress(OSError), connection.makefile("rb") as received:
            while first := received.readline():
                lines = [line.lower() for line in iter(received.readline, b"\r\n")]
                lengths = [int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")]
                body = received.read(sum(lengths))
                if not first.startswith(b"POST"):
                    connection.sendall(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n")
                    continue
                self.num_asked += 1
                if json.loads(body)["stream"]:
                    connection.sendall(_STREAM)

    def close(self) -> None:
        """Listen no more."""
        self._listener.close()


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[_Silent]:
    server = _Silent(tmp_path / "i.sock")
    yield server
    server.close()


def test_answers_that_a_stop_does_not_wait_for_end_with_an_error(
    settings: Settings, database: Database, tmp_path: Path, silent: _Silent
) -> None:
    with (
        running_api(
            settings, database, tmp_path / "api.log", LUTHIER_INFERENCE_URL=f"unix://{tmp_path}/i.sock"
        ) as (running, api),
        ThreadPoolExecutor(2) as pool,
    ):

        def ask(is_stream: bool) -> httpx2.Response:
            body = {"model": BASE_ID, "messages": [{"role": "user", "content": "a"}], "stream": is_stream}
            return api.ask("POST", "/chat/completions", body)

        streamed, whole = (pool.submit(ask, is_stream) for is_stream in (True, False))
        wait_until(lambda: silent.num_asked == 2, what="both are asked")
        running.process.send_signal(signal.SIGTERM)
        first, *_, last = streamed.result().text.strip().split("\n\n")
        assert first == "data: {}"
        assert whole.result().status_code == 503
        for error in (json.loads(last.removeprefix("data: "))["error"], whole.result().json()["error"]):
            assert (error["code"], "shutting down" in error["message"]) == ("service_unavailable", True)
        assert {"x-request-id", "retry-after"} <= set(whole.result().headers)
        assert running.process.wait(timeout=15) in (0, -signal.SIGTERM)
        assert "Traceback" not in running.log()


def test_a_stream_of_a_jobs_events_says_that_the_service_stops(api: Api, file_id: str) -> None:
    job_id = api.create_job(file_id)["id"]
    path = f"/v1/fine_tuning/jobs/{job_id}/events?stream=true"
    with api.http.stream("GET", path, headers=api.headers) as response:
        events = iter(httpx2.EventSource(response))
        assert next(events).id
        api.state.hub.close_streams()
        last = [*events][-1]
    error = json.loads(last.data)["error"]
    assert (last.event, error["code"]) == ("error", "service_unavailable")
    assert "shutting down" in error["message"]
