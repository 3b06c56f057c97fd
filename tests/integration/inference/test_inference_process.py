"""The inference server as an operator starts it: its socket's guard, its token, its end on a signal."""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest

from luthier.core.inference import HEADER_TOKEN
from tests.conftest import wait_until
from tests.inference_server import BARE, COMPLETIONS
from tests.stack import free_port
from tests.tiny import BASE_ID


def start_process(
    folder: Path, *, program: Sequence[str] = ("-m", "luthier.inference.server"), **environment: str
) -> subprocess.Popen[bytes]:
    values = {
        "LUTHIER_BASES_DIR": str(folder / "bases"),
        "LUTHIER_STORAGE_URL": f"file://{folder}/objects",
        "LUTHIER_CACHE_DIR": str(folder / "cache"),
        "LUTHIER_PRELOAD_BASE": BASE_ID,
        "LUTHIER_NUM_THREADS": "1",
        "LUTHIER_INFERENCE_DTYPE": "float32",
    } | environment
    return subprocess.Popen([sys.executable, *program], env=os.environ | values, stderr=subprocess.PIPE)


@contextlib.contextmanager
def started(
    folder: Path, url: str, **options: Any
) -> Iterator[tuple[subprocess.Popen[bytes], httpx2.Client]]:
    """Start a server, and hold it and a client of it; it is killed if it still runs at the end."""
    process = start_process(folder, LUTHIER_INFERENCE_URL=url, **options)
    path = url.removeprefix("unix://")
    transport, base_url = (None, url) if path == url else (httpx2.HTTPTransport(uds=path), "http://inference")
    try:
        with httpx2.Client(transport=transport, base_url=base_url, timeout=60) as client:
            yield process, client
    finally:
        process.kill()
        process.communicate()


def until_ready(process: subprocess.Popen[bytes], client: httpx2.Client) -> None:
    def is_ready() -> bool:
        assert process.poll() is None
        with contextlib.suppress(httpx2.TransportError):
            return client.get("/healthz").json()["ready"]
        return False

    # Imports take most of it, and kernels are compiled where they never were.
    wait_until(is_ready, "the process", seconds=180)


@contextlib.contextmanager
def served_process(folder: Path, name: str, **environment: str) -> Iterator[httpx2.Client]:
    """Run a server on a socket of that name, once it is ready."""
    with started(folder, f"unix://{folder / name}", **environment) as (process, client):
        until_ready(process, client)
        yield client


def test_the_process_guards_its_socket_and_stops_with_an_error_event(folder: Path, base_folder: Path) -> None:
    path = folder / "p.sock"
    # What a killed server leaves behind.
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    with started(folder, f"unix://{path}") as (process, client):
        until_ready(process, client)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        # Enough work for seconds, so that the signal comes in the middle of it.
        body = {"model": "m", "prompt": ["a"] * 128, "max_tokens": 250, "stream": True}
        with client.stream("POST", COMPLETIONS, json=body, headers=BARE.to_headers()) as response:
            lines = response.iter_lines()
            assert next(lines).startswith("data: ")
            process.send_signal(signal.SIGTERM)
            events = [line for line in lines if line]
        error = json.loads(events[-1].removeprefix("data: "))["error"]
        assert error["code"] == "service_unavailable"
        assert process.wait(10) == 0
        assert not path.exists()


def test_tcp_needs_the_token_in_settings_and_in_every_request_and_counts_what_was_done(
    folder: Path, base_folder: Path
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    process = start_process(folder, LUTHIER_INFERENCE_URL=url)
    _, log = process.communicate(timeout=60)
    assert process.returncode != 0 and b"LUTHIER_INTERNAL_TOKEN" in log
    with started(folder, url, LUTHIER_INTERNAL_TOKEN="right") as (process, client):
        until_ready(process, client)
        bearer, headers = {"authorization": "Bearer right"}, BARE.to_headers()

        def complete(**more: str) -> int:
            body = {"model": "m", "prompt": [5], "max_tokens": 1}
            return client.post(COMPLETIONS, json=body, headers=headers | more).status_code

        assert [complete(), complete(**{HEADER_TOKEN: "wrong"}), complete(**bearer)] == [401] * 3
        assert complete(**{HEADER_TOKEN: "right"}) == 200
        assert client.get("/internal/state").status_code == 401
        assert client.get("/metrics").status_code == 401
        # As Prometheus sends it.
        scraped = client.get("/metrics", headers=bearer)
        assert scraped.headers["content-type"].startswith("text/plain; version=")
        lines = scraped.text.splitlines()
        assert "luthier_inference_tokens_generated_total 1.0" in lines
        assert "luthier_inference_prompt_tokens_total 1.0" in lines
        assert "luthier_inference_steps_total 1.0" in lines
        assert 'luthier_inference_batch_rows_bucket{le="1.0"} 1.0' in lines
        assert "luthier_inference_time_to_first_token_seconds_count 1.0" in lines
        assert 'luthier_inference_model_loads_total{kind="packed"} 0.0' in lines


_DEAD_ENGINE = """
from luthier.inference.server import __main__ as server
from luthier.inference.engine import engine

def fail(*_):
    raise RuntimeError("swordfish")

engine.{where} = fail
server.main()
"""


@pytest.mark.parametrize(
    "where",
    [
        "Engine.add",
        pytest.param("Engine.step", marks=pytest.mark.full),
        pytest.param("EventBridge.flush", marks=pytest.mark.full),
    ],
)
def test_a_dead_engine_ends_its_process_which_says_why(folder: Path, base_folder: Path, where: str) -> None:
    program = ["-c", _DEAD_ENGINE.format(where=where)]
    with started(folder, f"unix://{folder}/dead.sock", program=program) as (process, client):
        body = {"model": "m", "prompt": "a", "max_tokens": 1}

        def has_ended() -> bool:
            with contextlib.suppress(httpx2.TransportError):
                client.post(COMPLETIONS, json=body, headers=BARE.to_headers(), timeout=20)
            return process.poll() is not None

        wait_until(has_ended, "the process ends with its engine")
        assert process.wait(60) == 70
        log = process.stderr.read().decode()
        assert "RuntimeError" in log and "engine" in log and "swordfish" not in log
