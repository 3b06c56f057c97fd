"""Workers as processes of their own, for tests that kill, stop and starve them."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2

from db.session import Database
from luthier.core.settings import Settings
from services.bootstrap import ensure_first_rows
from tests.conftest import ProjectClient, wait_until
from tests.stack import ROOT, descendants, free_port


@dataclass
class Worker:
    """A running `python -m worker`."""

    process: "subprocess.Popen[bytes]"
    log_path: Path

    def signal_all(self, number: int) -> None:
        """Send a signal to the worker and every process below it."""
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def signal_own(self, number: int) -> None:
        """Send a signal to the worker and its own processes, as a terminal does."""
        for pid in [self.process.pid, *descendants(self.process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                if os.getpgid(pid) == os.getpgid(self.process.pid):
                    os.kill(pid, number)

    def log(self) -> str:
        return self.log_path.read_text()


def environment_of(settings: Settings, **changes: object) -> dict[str, str]:
    """Return the environment in which a process reads these settings."""
    values = settings.model_copy(update=changes).model_dump(exclude_unset=True)
    found = {name: value for name, value in os.environ.items() if not name.startswith("LUTHIER_")}
    for name, value in values.items():
        text = value.get_secret_value() if hasattr(value, "get_secret_value") else value
        found[f"LUTHIER_{name.upper()}"] = str(text) if not isinstance(text, dict) else json.dumps(text)
    return found


@contextlib.contextmanager
def running_worker(
    settings: Settings, log_path: Path, *arguments: str, module: str = "worker", **environment: str
) -> Iterator[Worker]:
    """Run a worker, or another process of the service, until the block ends."""
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            cwd=ROOT,
            env=environment_of(settings) | environment,
            stdout=log,
            stderr=log,
        )
    worker = Worker(process, log_path)
    try:
        yield worker
    finally:
        worker.signal_all(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def running_api(
    settings: Settings, database: Database, log_path: Path, **environment: str
) -> Iterator[tuple[Worker, ProjectClient]]:
    """Run an API over the settings, without a broker; ready when it is yielded."""
    with database.transaction() as session:
        ensure_first_rows(session, settings)
    port, broker = free_port(), {"LUTHIER_REDIS_URL": "redis+socket:///nowhere"}
    with (
        running_worker(
            settings, log_path, "--port", str(port), module="api", **broker | environment
        ) as process,
        httpx2.Client(base_url=f"http://127.0.0.1:{port}") as http,
    ):
        wait_until(lambda: _is_ready(http), what="the API is ready")
        yield process, ProjectClient(http, settings.bootstrap_api_key.get_secret_value())


def _is_ready(http: httpx2.Client) -> bool:
    try:
        return http.get("/readyz").status_code == 200
    except httpx2.TransportError:
        return False
