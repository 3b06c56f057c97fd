"""SIGHUP: models.toml is read again by running processes, and a broken file changes nothing."""

import signal
from pathlib import Path

from db.session import Database
from luthier.core.settings import Settings
from tests.conftest import wait_until
from tests.workers import running_api, running_worker

_READ = "The catalogue of bases was read again"
_BROKEN = "The catalogue of bases is broken"


def test_an_api_reads_the_catalogue_again_and_keeps_the_old_one_when_it_is_broken(
    settings: Settings, database: Database, tmp_path: Path
) -> None:
    with running_api(settings, database, tmp_path / "api.log") as (process, api):
        file_id = api.upload_file(b'{"text": "a"}\n')

        def refusal() -> str:
            return api.refused("POST", "/fine_tuning/jobs", {"model": "none", "training_file": file_id})[3]

        assert "my-name" not in refusal()
        catalogue = settings.models_file.read_text()
        settings.models_file.write_text(catalogue + 'my-name = "tiny-llama"\n')
        process.process.send_signal(signal.SIGHUP)
        wait_until(lambda: "my-name" in refusal(), what="the new name is known")
        settings.models_file.write_text("[bases")
        process.process.send_signal(signal.SIGHUP)
        wait_until(lambda: _BROKEN in process.log(), what="the broken file is logged")
        assert "my-name" in refusal()


def test_a_worker_and_its_processes_read_the_catalogue_again(settings: Settings, tmp_path: Path) -> None:
    with running_worker(settings, tmp_path / "worker.log", "--no-broker") as worker:
        wait_until(lambda: "worker ready" in worker.log(), what="the worker is ready")

        def is_read() -> bool:
            worker.process.send_signal(signal.SIGHUP)
            return worker.log().count(_READ) >= 3

        wait_until(is_read, what="the worker and its two processes have read it")
        assert worker.process.poll() is None
