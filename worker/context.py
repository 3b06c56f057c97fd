"""The context of a worker process: settings, database, storage and catalogue, passed to the tasks."""

import contextlib
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement

from db.session import Database
from luthier.bases.catalogue import Catalogue, find_base_facts, load_catalogue, read_again
from luthier.core.devices import NVIDIA_DRIVER, Device, find_device
from luthier.core.settings import Settings
from luthier.storage.store import Storage
from luthier.trackers import discover
from luthier.webhooks.sealing import Sealer
from services.capacity import workers
from services.jobs.leases import Lease
from services.task_queue import Notify, TaskNotifier, make_celery
from worker.training_process.fork_server import ForkServer

# In the main process one for each thread of maintenance, webhooks, metrics; jobs need fewer.
_POOL_SIZE = 8
_MIN_ANSWER_SECONDS = 4.0


def _facts() -> dict[str, Any]:
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = {name: metadata.version(name) for name in ("luthier", "celery", "sqlalchemy")}
    trackers = [name for name, tracker in discover().items() if tracker.is_installed()]
    return {
        "num_cores": os.cpu_count(),
        "memory_bytes": memory_bytes,
        "versions": versions,
        "trackers": trackers,
    }


class Watch:
    """Measures for how long a sweeper has reached the database without a gap.

    A lease that expired during an outage of the database or of the sweeper does not show that its worker is
    dead. So no job is taken until both have been up for as long as a lease lasts.
    """

    def __init__(
        self, lease_seconds: float, sweep_seconds: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lease_seconds = lease_seconds
        self._max_gap_seconds = max(lease_seconds / 2, 2 * sweep_seconds)
        self._clock = clock
        self._since = self._last = clock()

    def has_seen_a_lease(self) -> bool:
        """Note that the database answers; return whether it has for as long as a lease lasts."""
        now = self._clock()
        if now - self._last > self._max_gap_seconds:
            self._since = now
        self._last = now
        return now - self._since >= self._lease_seconds


@dataclass
class WorkerContext:
    """The parts of a worker, and whether it has been asked to stop."""

    settings: Settings
    worker_id: str
    hostname: str
    database: Database
    storage: Storage
    catalogue: Catalogue
    notify: Notify
    sealer: Sealer
    watch: Watch
    facts: dict[str, Any] = field(default_factory=_facts)
    stopping: threading.Event = field(default_factory=threading.Event)
    # None where it is turned off.
    fork_server: ForkServer | None = None
    # None where the device's memory is unknown, and not counted.
    device: Device | None = None
    # Rows whose bytes could not be deleted, and when that is tried again; and when orphans are looked for.
    undeletable: dict[str, float] = field(default_factory=dict)
    orphans_due_at: float = 0.0
    # Ids of jobs whose specification this version can't read.
    unreadable: set[str] = field(default_factory=set)

    def list_bases(self) -> dict[str, str | None]:
        """Return the bases of the catalogue, each with its digest here, None where it would be fetched."""
        found = {
            base_id: find_base_facts(self.settings.bases_dir, base_id) for base_id in self.catalogue.bases
        }
        return {base_id: None if facts is None else facts.digest for base_id, facts in found.items()}

    def can_run(self) -> ColumnElement[bool]:
        return workers.can_run(self.list_bases(), self.unreadable)

    def run_dir(self, lease: Lease) -> Path:
        """Return where an attempt works; what a kill leaves there is removed by maintenance."""
        return self.settings.runs_dir.absolute() / lease.job_id / f"e{lease.fencing_token}"

    def read_catalogue(self) -> None:
        """Take the catalogue as it is now; a broken one changes nothing."""
        self.catalogue = read_again(self.settings.models_file, self.catalogue)

    def start_fork_server(self) -> None:
        """Let a process wait for the next run, where that is wanted; from the main thread alone."""
        if self.fork_server is not None and not self.stopping.is_set():
            self.fork_server.start()

    @property
    def num_threads(self) -> int:
        return self.settings.num_threads or os.cpu_count() or 1

    @property
    def training_memory_bytes(self) -> int | None:
        """Memory of the training device; None where that may be a GPU, whose memory needs torch."""
        may_be_gpu = self.settings.device == "auto" and NVIDIA_DRIVER.exists()
        if self.settings.device == "cuda" or may_be_gpu:
            return None
        return int(self.facts["memory_bytes"])


def remove_run_dir(run_dir: Path) -> None:
    """Remove where an attempt worked, and its job's folder unless another attempt is at work in it."""
    shutil.rmtree(run_dir, ignore_errors=True)
    with contextlib.suppress(OSError):
        run_dir.parent.rmdir()


def stop_on_signals(context: WorkerContext) -> None:
    """Set `context.stopping` at the first TERM, INT or QUIT. Main thread only."""
    asked: list[int] = []

    def stop(number: int, _: object) -> None:
        # A second signal may come within `set`, and would wait for the lock that the first one holds.
        if not asked:
            asked.append(number)
            context.stopping.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, stop)


def make_context(settings: Settings, *, worker_id: str | None = None) -> WorkerContext:
    """Make the context of a worker, or of one of its processes; nothing is connected yet."""
    hostname = socket.gethostname()
    return WorkerContext(
        settings=settings,
        worker_id=worker_id or workers.make_id(hostname),
        hostname=hostname,
        database=Database(
            settings.database_url.get_secret_value(),
            pool_size=_POOL_SIZE,
            # A lease outlasts three renewals that have no answer.
            answer_seconds=max(_MIN_ANSWER_SECONDS, settings.lease_seconds / 3),
        ),
        storage=Storage.open(settings.storage_url),
        catalogue=load_catalogue(settings.models_file),
        device=find_device(settings),
        fork_server=ForkServer(settings.warm_spare_seconds) if settings.warm_spare_seconds else None,
        watch=Watch(settings.lease_seconds, settings.sweep_seconds),
        sealer=Sealer(settings.secret_key.get_secret_value()),
        notify=TaskNotifier(make_celery(settings.redis_url.get_secret_value())).notify,
    )
