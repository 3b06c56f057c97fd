"""One LISTEN connection for each API process, fanned out to the open event streams."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import structlog

from db.session import KEEPALIVE
from services.jobs.events import CHANNEL

_RECONNECT_SECONDS = 1.0
_CONNECT_SECONDS = 3
_log = structlog.get_logger()


class EventHub:
    """Wakes the streams of a job when Postgres notifies of new events.

    Notifications only reduce the delay: streams also poll.

    Args:
        database_url: in SQLAlchemy's form.
    """

    def __init__(self, database_url: str) -> None:
        self._url = database_url.replace("postgresql+psycopg://", "postgresql://", 1)
        self._waiting: dict[str, set[asyncio.Event]] = {}
        self._task: asyncio.Task[None] | None = None
        self.closing = asyncio.Event()

    def start(self) -> None:
        self._task = asyncio.create_task(self._listen())

    async def stop(self) -> None:
        """End every stream and the connection."""
        self.close_streams()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def close_streams(self) -> None:
        """End the open streams, so that the server can stop."""
        self.closing.set()
        self._wake_all()

    @contextmanager
    def subscribe(self, job_id: str) -> Iterator[asyncio.Event]:
        """Yield an event that is set when the job has new events; the subscriber clears it before reading."""
        woken = asyncio.Event()
        self._waiting.setdefault(job_id, set()).add(woken)
        try:
            yield woken
        finally:
            subscribers = self._waiting[job_id]
            subscribers.discard(woken)
            if not subscribers:
                del self._waiting[job_id]

    def _wake_all(self) -> None:
        for subscribers in self._waiting.values():
            for woken in subscribers:
                woken.set()

    async def _listen(self) -> None:
        while True:
            try:
                connection = await psycopg.AsyncConnection.connect(
                    self._url, autocommit=True, connect_timeout=_CONNECT_SECONDS, **KEEPALIVE
                )
                async with connection:
                    await connection.execute(f"LISTEN {CHANNEL}".encode())
                    # Events from before LISTEN began.
                    self._wake_all()
                    async for notification in connection.notifies():
                        for woken in self._waiting.get(notification.payload, ()):
                            woken.set()
            except psycopg.Error as error:
                _log.warning("event listener lost its connection", error=type(error).__name__)
            await asyncio.sleep(_RECONNECT_SECONDS)
