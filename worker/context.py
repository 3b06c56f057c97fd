"""What one worker process is made of; passed to the tasks as a value."""

import os
import secrets
import socket
import threading
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from db.session import Database
from luthier.bases.catalogue import Catalogue, load_catalogue
from luthier.core.devices import NVIDIA_DRIVER, Device, find_device
from luthier.core.sealing import Sealer
from luthier.core.settings import Settings
from luthier.storage.store import Storage
from luthier.trackers import discover
from services.bell import Bell, Ring, make_celery
from worker.spare import WarmSpare

# In the main process one for each thread of maintenance, webhooks, calibration, metrics; jobs need fewer.
_POOL_SIZE = 8


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


@dataclass
class WorkerContext:
    """The parts of a worker, and whether it has been asked to stop."""

    settings: Settings
    worker_id: str
    hostname: str
    database: Database
    storage: Storage
    catalogue: Catalogue
    ring: Ring
    sealer: Sealer
    facts: dict[str, Any] = field(default_factory=_facts)
    stopping: threading.Event = field(default_factory=threading.Event)
    # None where no process shall wait for a run.
    spare: WarmSpare | None = None
    # None where nobody knows how much memory it has: then nobody counts it.
    device: Device | None = None
    # The inference servers that serve from it, by URL, as this process saw them last.
    serving_ids: dict[str, str] = field(default_factory=dict)
    has_looked_at_serving: bool = False
    # Rows whose bytes could not be deleted, and when that is tried again; and when orphans are looked for.
    undeletable: dict[str, float] = field(default_factory=dict)
    orphans_due_at: float = 0.0

    def keep_spare(self) -> None:
        """Let a process wait for the next run, where that is wanted; from the main thread alone."""
        if self.spare is not None and not self.stopping.is_set():
            self.spare.start()

    @property
    def num_threads(self) -> int:
        """CPU threads of one training run."""
        return self.settings.num_threads or os.cpu_count() or 1

    @property
    def training_memory_bytes(self) -> int | None:
        """Memory of the training device; None where that may be a GPU, whose memory only torch can tell."""
        may_be_gpu = self.settings.device == "auto" and NVIDIA_DRIVER.exists()
        if self.settings.device == "cuda" or may_be_gpu:
            return None
        return int(self.facts["memory_bytes"])


def make_context(settings: Settings, *, worker_id: str | None = None) -> WorkerContext:
    """Make the parts of a worker, or of one of its processes; nothing is connected yet.

    Args:
        worker_id: the worker that the process belongs to; None makes a new one.
    """
    hostname = socket.gethostname()
    return WorkerContext(
        settings=settings,
        worker_id=worker_id or f"{hostname}-{os.getpid()}-{secrets.token_hex(4)}",
        hostname=hostname,
        database=Database(settings.database_url.get_secret_value(), pool_size=_POOL_SIZE),
        storage=Storage.open(settings.storage_url),
        catalogue=load_catalogue(settings.models_file),
        device=find_device(settings),
        spare=WarmSpare(settings.warm_spare_seconds) if settings.warm_spare_seconds else None,
        sealer=Sealer(settings.secret_key.get_secret_value()),
        ring=Bell(make_celery(settings.redis_url.get_secret_value())).ring,
    )
