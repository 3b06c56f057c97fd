"""Collects the usage of requests and stores it every second, in a thread."""

import asyncio

import structlog
from starlette.concurrency import run_in_threadpool

from db.session import Database
from luthier.core.errors import UnavailableError
from services.accounts import usage
from services.accounts.usage import TokenCounts, UsageOwner

_FLUSH_SECONDS = 1.0
_log = structlog.get_logger()


class UsageRecorder:
    """Counts by key and model. A killed process loses the counts of its last second."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._counts: dict[UsageOwner, TokenCounts] = {}
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start storing."""
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Store the rest."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        await self.flush()

    def add(self, owner: UsageOwner, counts: TokenCounts) -> None:
        """Count a request; called on the event loop."""
        self._counts.setdefault(owner, TokenCounts()).add(counts)

    async def flush(self) -> None:
        """Store the counts; they are kept for the next flush when that fails."""
        counts, self._counts = self._counts, {}
        if not counts:
            return
        # Shielded: after a cancellation in the middle, counts would be stored twice.
        await asyncio.shield(self._store(counts))

    async def _store(self, counts: dict[UsageOwner, TokenCounts]) -> None:
        try:
            await run_in_threadpool(self._write, counts)
        except UnavailableError:
            _log.warning("usage could not be stored yet", num_owners=len(counts))
        except Exception:  # noqa: BLE001
            # Counting continues for as long as the process lives.
            _log.exception("usage could not be stored", num_owners=len(counts))
        else:
            return
        for owner, used in counts.items():
            self.add(owner, used)

    def _write(self, counts: dict[UsageOwner, TokenCounts]) -> None:
        with self._database.transaction() as session:
            usage.record(session, counts)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(_FLUSH_SECONDS)
            await self.flush()
