"""A stop of the API: what lasts longer than it waits ends with an error in OpenAI's shape."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx2
import pytest

from db.session import Database
from luthier.core.settings import Settings
from services.bootstrap import ensure_first_rows
from tests.aliases import make_ours
from tests.conftest import Api, wait_until
from tests.stack import free_port
from tests.tiny import BASE_ID

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
    with database.transaction() as session:
        ensure_first_rows(session, settings)
    port, log = free_port(), tmp_path / "api.log"
    environment = os.environ | {
        "LUTHIER_DATABASE_URL": settings.database_url.get_secret_value(),
        "LUTHIER_REDIS_URL": "redis+socket:///nowhere",
        "LUTHIER_STORAGE_URL": settings.storage_url,
        "LUTHIER_MODELS_FILE": str(settings.models_file),
        "LUTHIER_INFERENCE_URL": f"unix://{tmp_path}/i.sock",
    }
    with log.open("wb") as stream:
        running = subprocess.Popen(
            [sys.executable, "-m", "api", "--port", str(port)], env=environment, stderr=stream, stdout=stream
        )
    base_url = f"http://127.0.0.1:{port}"
    headers = {"Authorization": f"Bearer {settings.bootstrap_api_key.get_secret_value()}"}

    def answers() -> bool:
        try:
            return httpx2.get(f"{base_url}/readyz").status_code == 200
        except httpx2.TransportError:
            return False

    def ask(is_stream: bool) -> httpx2.Response:
        body = {"model": BASE_ID, "messages": [{"role": "user", "content": "a"}], "stream": is_stream}
        return httpx2.post(f"{base_url}/v1/chat/completions", json=body, headers=headers, timeout=30)

    try:
        wait_until(answers, what="the API is ready")
        with ThreadPoolExecutor(2) as pool:
            streamed, whole = (pool.submit(ask, is_stream) for is_stream in (True, False))
            wait_until(lambda: silent.num_asked == 2, what="both are asked")
            running.send_signal(signal.SIGTERM)
            first, *_, last = streamed.result().text.strip().split("\n\n")
            assert first == "data: {}"
            error = json.loads(last.removeprefix("data: "))["error"]
            assert (error["code"], "shutting down" in error["message"]) == ("service_unavailable", True)
            assert whole.result().status_code == 503
            error = whole.result().json()["error"]
            assert (error["code"], "shutting down" in error["message"]) == ("service_unavailable", True)
            assert {"x-request-id", "retry-after"} <= set(whole.result().headers)
        assert running.wait(timeout=15) in (0, -signal.SIGTERM)
        assert "Traceback" not in log.read_text()
    finally:
        running.kill()
        running.wait(timeout=15)


def test_a_stream_of_a_jobs_events_says_that_the_service_stops(api: Api) -> None:
    make_ours(api)
    jobs = httpx2.get(f"{api.base_url}/v1/fine_tuning/jobs", headers=api.headers).json()["data"]
    url = f"{api.base_url}/v1/fine_tuning/jobs/{jobs[0]['id']}/events"
    with httpx2.stream("GET", url, params={"stream": "true"}, headers=api.headers, timeout=30) as response:
        events = iter(httpx2.EventSource(response))
        assert next(events).id
        api.state.hub.close_streams()
        last = [*events][-1]
    error = json.loads(last.data)["error"]
    assert (last.event, error["code"]) == ("error", "service_unavailable")
    assert "shutting down" in error["message"]
