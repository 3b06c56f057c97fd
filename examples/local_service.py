"""Runs `luthier up` for the length of a block. It must never outlive the program that started it."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from luthier.cli.stack.home import find_lock_holder
from luthier.cli.stack.postgres_programs import state_root
from luthier.core.runtime import die_with_parent

READY_SECONDS = 180.0
STOP_SECONDS = 20.0
# Marks a home that may be deleted; others hold a user's models.
_MARKER = "made-by-demo"


class ServiceFailedError(Exception):
    """The service did not start; the message says where its logs are."""


@dataclass(frozen=True)
class RunningService:
    """A service that answers at `base_url`; it took `start_seconds` to be ready."""

    base_url: str
    api_key: str
    start_seconds: float


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def make_fresh_home(home: Path) -> None:
    """Make an empty home; one that this function made before is removed first, with its database.

    Raises:
        ServiceFailedError: when something else is there, or a service runs on it.
    """
    if home.exists():
        _remove_home(home)
    home.mkdir(parents=True, mode=0o700)
    (home / _MARKER).touch()


def _remove_home(home: Path) -> None:
    if not (home / _MARKER).exists():
        raise ServiceFailedError(
            f"{home} was not made by the demo and is left alone; name another by --home."
        )
    if find_lock_holder(home) is not None:
        raise ServiceFailedError(f"A service runs on {home}; stop it first.")
    secrets = home / "secrets.json"
    if secrets.exists():
        # As root the database is kept below the system's state folder.
        shutil.rmtree(state_root() / json.loads(secrets.read_bytes())["home_id"], ignore_errors=True)
    shutil.rmtree(home)


@contextlib.contextmanager
def running_service(home: Path, port: int) -> Iterator[RunningService]:
    """Start the service, wait until it is ready, and stop it at the end of the block, whatever happens.

    Args:
        home: the service's home.
        port: its port on 127.0.0.1.

    Yields:
        The running service.

    Raises:
        ServiceFailedError: when it ends, or takes longer than READY_SECONDS, before it is ready.
    """
    started = time.monotonic()
    process = _start(home, port)
    try:
        _wait_until_ready(process, home)
        connection = json.loads((home / "connection.json").read_bytes())
        yield RunningService(connection["base_url"], connection["api_key"], time.monotonic() - started)
    finally:
        _stop(process)


def _start(home: Path, port: int) -> "subprocess.Popen[str]":
    parent = os.getpid()
    command = [sys.executable, "-m", "luthier.cli.main", "up", "--home", str(home), "--port", str(port)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Ctrl-C must reach us alone: we then stop the service in order.
        start_new_session=True,
        # Only async-signal-safe work happens between fork and exec: one system call.
        preexec_fn=lambda: die_with_parent(parent, signal.SIGTERM),  # noqa: PLW1509
    )


def _wait_until_ready(process: "subprocess.Popen[str]", home: Path) -> None:
    is_ready = threading.Event()
    has_ended = threading.Event()

    def read_lines() -> None:
        assert process.stdout is not None
        # Read on after the service is ready, or a full pipe would hold it up.
        for line in process.stdout:
            if line.startswith("Ready:"):
                is_ready.set()
            elif not is_ready.is_set() or " died " in line:
                print(f"  {line.rstrip()}", flush=True)
        has_ended.set()
        is_ready.set()

    threading.Thread(target=read_lines, name="service-output", daemon=True).start()
    if not is_ready.wait(READY_SECONDS):
        raise ServiceFailedError(f"The service was not ready in {READY_SECONDS:.0f} s; see {home / 'logs'}.")
    if has_ended.is_set():
        raise ServiceFailedError(f"The service ended before it was ready; see {home / 'logs'}.")


def _stop(process: "subprocess.Popen[str]") -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        # Its own processes are tied to it and end with it.
        process.kill()
        process.wait()
