"""The inference server as an operator starts it: its socket's guard, its token, its end on a signal."""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx2
import pytest

from luthier.core.inference import HEADER_TOKEN
from tests.inference_server import BARE, COMPLETIONS, wait_until
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
def served_process(folder: Path, name: str, **environment: str) -> Iterator[httpx2.Client]:
    """Run a server on a socket of that name, once it is ready."""
    path = folder / name
    process = start_process(folder, LUTHIER_INFERENCE_URL=f"unix://{path}", **environment)
    try:
        transport = httpx2.HTTPTransport(uds=str(path))
        with httpx2.Client(transport=transport, base_url="http://inference", timeout=60) as client:

            def is_ready() -> bool:
                assert process.poll() is None
                try:
                    return bool(client.get("/healthz").json()["ready"])
                except httpx2.TransportError:
                    return False

            wait_until(is_ready, "the process")
            yield client
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_the_process_guards_its_socket_and_stops_at_once_with_an_error_event(
    folder: Path, base_folder: Path
) -> None:
    path = folder / "p.sock"
    # What a killed server leaves behind.
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    process = start_process(folder, LUTHIER_INFERENCE_URL=f"unix://{path}")
    try:
        transport = httpx2.HTTPTransport(uds=str(path), retries=0)
        with httpx2.Client(transport=transport, base_url="http://inference", timeout=60) as client:

            def is_ready() -> bool:
                assert process.poll() is None
                try:
                    return bool(client.get("/healthz").json()["ready"])
                except httpx2.TransportError:
                    return False

            wait_until(is_ready, "the process")
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
    finally:
        process.kill()
        process.communicate()


def test_tcp_needs_the_token_in_settings_and_in_every_request_and_tells_what_was_done(
    folder: Path, base_folder: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    process = start_process(folder, LUTHIER_INFERENCE_URL=url)
    _, log = process.communicate(timeout=60)
    assert process.returncode != 0 and b"LUTHIER_INTERNAL_TOKEN" in log
    process = start_process(folder, LUTHIER_INFERENCE_URL=url, LUTHIER_INTERNAL_TOKEN="right")
    try:
        with httpx2.Client(base_url=url, timeout=60) as client:

            def answers() -> bool:
                assert process.poll() is None
                try:
                    return client.get("/healthz").status_code == 200
                except httpx2.TransportError:
                    return False

            wait_until(answers, "the process")
            body = {"model": "m", "prompt": [5], "max_tokens": 1}
            headers = BARE.to_headers()
            assert client.post(COMPLETIONS, json=body, headers=headers).status_code == 401
            wrong = headers | {HEADER_TOKEN: "wrong"}
            assert client.post(COMPLETIONS, json=body, headers=wrong).status_code == 401
            right = headers | {HEADER_TOKEN: "right"}
            assert client.post(COMPLETIONS, json=body, headers=right).status_code == 200
            assert client.get("/internal/state").status_code == 401
            assert client.get("/metrics").status_code == 401
            # As Prometheus sends it.
            told = client.get("/metrics", headers={"authorization": "Bearer right"})
            assert told.headers["content-type"].startswith("text/plain; version=")
            lines = told.text.splitlines()
            assert "luthier_inference_tokens_generated_total 1.0" in lines
            assert "luthier_inference_prompt_tokens_total 1.0" in lines
            assert "luthier_inference_steps_total 1.0" in lines
            assert 'luthier_inference_batch_rows_bucket{le="1.0"} 1.0' in lines
            assert "luthier_inference_time_to_first_token_seconds_count 1.0" in lines
            assert 'luthier_inference_model_loads_total{kind="packed"} 0.0' in lines
            bearer = {"authorization": "Bearer right"}
            assert client.post(COMPLETIONS, json=body, headers=headers | bearer).status_code == 401
    finally:
        process.kill()
        process.communicate()


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
    path = folder / "dead.sock"
    process = start_process(
        folder,
        LUTHIER_INFERENCE_URL=f"unix://{path}",
        program=["-c", _DEAD_ENGINE.format(where=where)],
    )
    try:
        transport = httpx2.HTTPTransport(uds=str(path), retries=0)
        body = {"model": "m", "prompt": "a", "max_tokens": 1}
        deadline = time.monotonic() + 60
        with httpx2.Client(transport=transport, base_url="http://inference", timeout=20) as client:
            while process.poll() is None:
                assert time.monotonic() < deadline, "the process outlives its engine"
                with contextlib.suppress(httpx2.TransportError):
                    client.post(COMPLETIONS, json=body, headers=BARE.to_headers())
        assert process.wait(60) == 70
        assert process.stderr is not None
        log = process.stderr.read().decode()
        assert "RuntimeError" in log and "engine" in log and "swordfish" not in log
    finally:
        process.kill()
        process.wait()
