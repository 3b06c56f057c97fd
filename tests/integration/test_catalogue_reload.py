"""SIGHUP: models.toml is read again by running processes, and a broken file changes nothing."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2

from db.session import Database
from luthier.core.settings import Settings
from services.bootstrap import ensure_first_rows
from tests.conftest import wait_until
from tests.stack import ROOT, free_port

_READ = "The catalogue of bases was read again"
_BROKEN = "The catalogue of bases is broken"


@contextmanager
def _running(settings: Settings, log: Path, *command: str) -> "Iterator[subprocess.Popen[bytes]]":
    environment = os.environ | {
        "LUTHIER_DATABASE_URL": settings.database_url.get_secret_value(),
        "LUTHIER_STORAGE_URL": settings.storage_url,
        "LUTHIER_MODELS_FILE": str(settings.models_file),
        "LUTHIER_BASES_DIR": str(settings.bases_dir),
        "LUTHIER_RUNS_DIR": str(settings.runs_dir),
        "LUTHIER_WARM_SPARE_SECONDS": "0",
        "LUTHIER_SWEEP_SECONDS": "0.5",
    }
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=ROOT, env=environment, stdout=stream, stderr=stream
        )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_an_api_reads_the_catalogue_again_and_keeps_the_old_one_when_it_is_broken(
    settings: Settings, database: Database, tmp_path: Path
) -> None:
    with database.transaction() as session:
        ensure_first_rows(session, settings)
    port, log = free_port(), tmp_path / "api.log"
    headers = {"Authorization": f"Bearer {settings.bootstrap_api_key.get_secret_value()}"}
    files = {"purpose": (None, "fine-tune"), "file": ("a.jsonl", b'{"text": "a"}\n')}

    def refusal() -> str:
        url = f"http://127.0.0.1:{port}/v1/fine_tuning/jobs"
        body = {"model": "none", "training_file": file_id}
        return str(httpx2.post(url, headers=headers, json=body).json()["error"]["message"])

    def answers() -> bool:
        try:
            return httpx2.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
        except httpx2.TransportError:
            return False

    with _running(settings, log, "api", "--port", str(port)) as process:
        wait_until(answers, what="the API answers")
        file_id = httpx2.post(f"http://127.0.0.1:{port}/v1/files", headers=headers, files=files).json()["id"]
        assert "my-name" not in refusal()
        catalogue = settings.models_file.read_text()
        settings.models_file.write_text(catalogue + 'my-name = "tiny-llama"\n')
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: "my-name" in refusal(), what="the new name is known")
        settings.models_file.write_text("[bases")
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: _BROKEN in log.read_text(), what="the broken file is logged")
        assert "my-name" in refusal()


def test_a_worker_and_its_processes_read_the_catalogue_again(settings: Settings, tmp_path: Path) -> None:
    log = tmp_path / "worker.log"
    with _running(settings, log, "worker", "--no-broker") as process:
        wait_until(lambda: "worker ready" in log.read_text(), what="the worker is ready")

        def is_read() -> bool:
            process.send_signal(signal.SIGHUP)
            return log.read_text().count(_READ) >= 3

        wait_until(is_read, what="the worker and its two processes have read it")
        assert process.poll() is None
