"""A connection to Postgres that never waits for an answer for longer than it may.

The server's own timeouts say nothing when the server, or the way to it, is gone without a word: the kernel
then waits for a quarter of an hour, and on a Unix socket or behind a proxy for ever.
"""

import time
from collections.abc import Generator
from contextlib import suppress
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen

RV = TypeVar("RV")

# How soon a host that is gone is noticed while nothing is asked; no more than hints on a Unix socket.
KEEPALIVE: dict[str, Any] = {
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 2,
}
# A transaction whose process stands still gives its locks up.
_IDLE_SECONDS = 30


class _NoAnswerError(psycopg.OperationalError):
    """The server has not answered in time; the connection is closed."""


class BoundedConnection(psycopg.Connection[Any]):
    """A connection that is closed, with an error, when a statement has no answer in time."""

    # None: as long as it takes.
    answer_seconds: float | None = None

    def wait(self, gen: PQGen[RV], *arguments: Any, **options: Any) -> RV:
        """Wait for the server as psycopg does, up to `answer_seconds`."""
        if self.answer_seconds is None:
            return super().wait(gen, *arguments, **options)
        try:
            return super().wait(_until(gen, time.monotonic() + self.answer_seconds), *arguments, **options)
        except _NoAnswerError:
            # What it was doing is not known: no statement can follow.
            with suppress(psycopg.Error):
                self.close()
            raise


def connect(*, answer_seconds: float | None, **options: Any) -> BoundedConnection:
    """Connect, with timeouts on both sides.

    Args:
        answer_seconds: how long a statement may take, and wait for a lock; None: as long as it takes.
    """
    server_options = [f"-c idle_in_transaction_session_timeout={_IDLE_SECONDS}s"]
    if answer_seconds is not None:
        milliseconds = int(answer_seconds * 1000)
        server_options += [f"-c statement_timeout={milliseconds}", f"-c lock_timeout={milliseconds * 3 // 4}"]
        options["tcp_user_timeout"] = milliseconds
    # What the URL says of its own comes last, and wins.
    options["options"] = " ".join([*server_options, options.get("options", "")])
    connection = BoundedConnection.connect(**KEEPALIVE, **options)
    connection.answer_seconds = answer_seconds
    return connection


def _until(gen: PQGen[RV], deadline: float) -> Generator[Any, Any, RV]:
    """Pass a generator of psycopg on until a deadline; it is asked at every tenth of a second."""
    try:
        wanted = next(gen)
        while True:
            ready = yield wanted
            if not ready and time.monotonic() > deadline:
                raise _NoAnswerError("the server has not answered in time")
            wanted = gen.send(ready)
    except StopIteration as end:
        result: RV = end.value
        return result
