"""What a client without a key can hold of a server's process: headers, silence, bodies, connections."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from luthier.core.inference import HEADER_TOKEN
from tests.conftest import wait_until
from tests.stack import ROOT, free_port

_HEADER_SECONDS = _BODY_SECONDS = 1.0
_MAX_CONNECTIONS = 8
_LIMITS = {
    "LUTHIER_HEADER_TIMEOUT_SECONDS": str(_HEADER_SECONDS),
    "LUTHIER_BODY_TIMEOUT_SECONDS": str(_BODY_SECONDS),
    "LUTHIER_MAX_CONNECTIONS": str(_MAX_CONNECTIONS),
}
# Generous: what is checked is that it ends at all.
_PATIENCE_SECONDS = 20.0
_HEALTH = b"GET /healthz HTTP/1.1\r\nhost: x\r\n"
_POST = b"POST /v1/fine_tuning/jobs HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


@contextmanager
def _running(folder: Path, *command: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "log").open("wb") as log:
        # A soft limit of files as shells have it, lower.
        process = subprocess.Popen(
            ["sh", "-c", 'ulimit -Sn 256; exec "$@"', "sh", sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **_LIMITS, **environment},
            stdout=log,
            stderr=log,
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=30)


def _answers(port: int) -> bool:
    with suppress(OSError):
        return b"200 OK" in _ask(port, _HEALTH + b"connection: close\r\n\r\n")
    return False


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int]]:
    """The port and pid of an API without a database; nothing here needs one."""
    port = free_port()
    with _running(tmp_path_factory.mktemp("api"), "-m", "api", "--port", str(port)) as process:
        wait_until(lambda: _answers(port), "the API answers")
        yield port, process.pid


@pytest.fixture(scope="module")
def inference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of an inference server on TCP, without a base."""
    port = free_port()
    settings = {
        "LUTHIER_INFERENCE_URL": f"http://127.0.0.1:{port}",
        "LUTHIER_INTERNAL_TOKEN": "token",
        "LUTHIER_PRELOAD_BASE": "",
        "LUTHIER_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    command = ("-m", "luthier.inference.server")
    with _running(tmp_path_factory.mktemp("inference"), *command, **settings):
        wait_until(lambda: _answers(port), "the inference server answers")
        yield port


@contextmanager
def _connection(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE_SECONDS) as connection:
        yield connection


def _read_to_end(connection: socket.socket) -> bytes:
    """Return what comes until the server closes; a server that does not is a time-out."""
    answer = b""
    with suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            answer += piece
    return answer


def _ask(port: int, request: bytes) -> bytes:
    with _connection(port) as connection:
        connection.sendall(request)
        return _read_to_end(connection)


def _error(answer: bytes) -> str:
    return str(json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"])


def _trickle_until_closed(connection: socket.socket, byte: bytes) -> None:
    connection.settimeout(0.1)
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            connection.sendall(byte)
            if connection.recv(65536) == b"":
                return
        except TimeoutError:
            continue
        except (ConnectionResetError, BrokenPipeError):
            return
    pytest.fail("the connection is still open")


@pytest.fixture(params=["api", "inference"])
def port(request: pytest.FixtureRequest) -> int:
    """The port of either server: they have the same limits."""
    found = request.getfixturevalue(request.param)
    return found[0] if request.param == "api" else found


def test_headers_are_bounded_in_bytes_and_the_refusal_says_so(port: int) -> None:
    answer = _ask(port, _HEALTH + b"x-long: " + b"a" * 70_000)
    assert answer.startswith(b"HTTP/1.1 431 ")
    assert _error(answer) == "headers_too_large"
    # A line that ends is no better, nor are many.
    many = b"".join(b"x-%d: %s\r\n" % (number, b"a" * 1000) for number in range(70))
    assert _ask(port, _HEALTH + many + b"\r\n").startswith(b"HTTP/1.1 431 ")
    assert b"200 OK" in _ask(port, _HEALTH + b"x: " + b"a" * 60_000 + b"\r\nconnection: close\r\n\r\n")


def test_a_connection_that_sends_no_whole_headers_is_closed(port: int) -> None:
    with _connection(port) as silent, _connection(port) as half, _connection(port) as slow:
        half.sendall(_HEALTH[:20])
        slow.sendall(_HEALTH[:20])
        assert _read_to_end(silent) == b""
        assert _read_to_end(half) == b""
        _trickle_until_closed(slow, b"a")


def test_a_second_request_of_a_connection_has_the_same_limits(api: tuple[int, int]) -> None:
    with _connection(api[0]) as connection:
        connection.sendall(_HEALTH + b"\r\n")
        assert b"200 OK" in connection.recv(65536)
        connection.sendall(_HEALTH[:20])
        _trickle_until_closed(connection, b"a")


def test_a_body_that_pauses_ends_its_connection_and_a_slow_one_does_not(api: tuple[int, int]) -> None:
    with _connection(api[0]) as silent:
        silent.sendall(_POST + b"content-length: 100\r\n\r\n{")
        assert _read_to_end(silent) == b""
    with _connection(api[0]) as slow:
        slow.sendall(_POST + b"content-length: 12\r\nconnection: close\r\n\r\n")
        for byte in b'{"a": "abc"}':
            time.sleep(_BODY_SECONDS / 5)
            slow.sendall(bytes([byte]))
        assert b"401 " in _read_to_end(slow)


def test_a_large_body_that_trickles_ends_its_connection(inference: int) -> None:
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n{HEADER_TOKEN}: token\r\n".encode()
    with _connection(inference) as connection:
        connection.sendall(head + b"content-length: 2000000\r\n\r\n" + b" " * 300_000)
        _trickle_until_closed(connection, b" ")


def test_a_body_that_continues_after_the_answer_ends_its_connection(api: tuple[int, int]) -> None:
    with _connection(api[0]) as connection:
        path = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n"
        connection.sendall(path)
        assert b"401 " in connection.recv(65536)
        _trickle_until_closed(connection, b"a")


def test_connections_beyond_the_limit_are_refused_and_the_next_ones_are_served(api: tuple[int, int]) -> None:
    port = api[0]
    with ExitStack() as held:
        for _ in range(_MAX_CONNECTIONS):
            connection = held.enter_context(_connection(port))
            connection.sendall(_POST + b"content-length: 100\r\n\r\n")
        refused = _ask(port, _HEALTH + b"\r\n")
        assert refused.startswith(b"HTTP/1.1 503 ")
        assert _error(refused) == "service_unavailable"
        assert b"retry-after: 1" in refused
    wait_until(lambda: _answers(port), "connections are served again")


def test_connections_without_a_request_give_way_to_the_next_one(api: tuple[int, int]) -> None:
    port = api[0]
    with ExitStack() as held:
        connections = [held.enter_context(_connection(port)) for _ in range(3 * _MAX_CONNECTIONS)]
        for connection in connections[::2]:
            connection.sendall(_HEALTH)
        assert b"200 OK" in _ask(port, _HEALTH + b"connection: close\r\n\r\n")


def test_a_process_may_open_as_many_files_as_the_system_allows(api: tuple[int, int]) -> None:
    limits = Path(f"/proc/{api[1]}/limits").read_text().splitlines()
    soft, hard = next(line.split()[3:5] for line in limits if line.startswith("Max open files"))
    assert int(soft) == min(int(hard), 65536) > 256


def test_an_upgrade_to_web_sockets_is_no_other_request(api: tuple[int, int]) -> None:
    upgrade = (
        b"upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: a\r\n"
    )
    with _connection(api[0]) as connection:
        connection.sendall(_HEALTH + upgrade + b"\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200 ")
