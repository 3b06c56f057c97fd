"""Limits of work at the same time: requests of a project, bytes of bodies in memory, long work in threads.

Each bounds one process of the API. What is over a limit is refused, or waits without a thread.
"""

import asyncio
import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import anyio
import anyio.to_thread

from luthier.core.errors import TooManyRequestsError, UnavailableError
from luthier.core.settings import MIB

T = TypeVar("T")

# Bytes of a body that are read before its key is looked up; not counted, since connections bound them.
MAX_UNCOUNTED_BYTES = 16 * 1024
_MAX_WAIT_SECONDS = 20.0


class ProjectLimiter:
    """Bounds how much of one kind of work runs, for each project and in all; more is refused. Thread-safe.

    Args:
        what: the work in the plural, for the refusal, such as "large files being checked".
    """

    def __init__(self, num_per_project: int, num_in_all: float = math.inf, *, what: str) -> None:
        self._num_per_project, self._num_in_all, self._what = num_per_project, num_in_all, what
        self._held: Counter[str] = Counter()
        self._lock = threading.Lock()

    def acquire(self, project_id: str) -> None:
        """Begin a piece of work, which `release` ends.

        Raises:
            TooManyRequestsError: when the project is at its limit.
            UnavailableError: when all projects together are at theirs.
        """
        with self._lock:
            if self._held[project_id] >= self._num_per_project:
                raise TooManyRequestsError(
                    f"This project has {self._held[project_id]} {self._what}, and the limit is "
                    f"{self._num_per_project} at a time; try again when one of them is done."
                )
            if self._held.total() >= self._num_in_all:
                raise UnavailableError(
                    f"There are {self._held.total()} {self._what}, the most at a time here; try again."
                )
            self._held[project_id] += 1

    def release(self, project_id: str) -> None:
        """End a piece of work."""
        with self._lock:
            self._held[project_id] -= 1
            if not self._held[project_id]:
                del self._held[project_id]

    @contextmanager
    def hold(self, project_id: str) -> Iterator[None]:
        """Count the block as a piece of work; raises as `acquire` does."""
        self.acquire(project_id)
        try:
            yield
        finally:
            self.release(project_id)


class LongWork:
    """Long work, each piece in a thread of its own: one for a project, a few in all. The rest waits in none.

    Args:
        projects: refuses a project's second piece, and what would wait beyond the limit in all.
        busy: the message of the refusal after waiting for too long.
    """

    def __init__(self, num_at_once: int, projects: ProjectLimiter, *, busy: str) -> None:
        self._semaphore, self._projects, self._busy = asyncio.Semaphore(num_at_once), projects, busy

    async def run_in_thread(self, project_id: str, work: Callable[[], T]) -> T:
        """Run a piece of work in a thread that serves no requests.

        Raises:
            TooManyRequestsError: when the project has a piece already.
            UnavailableError: when the work could not begin in time.
        """
        with self._projects.hold(project_id):
            try:
                async with asyncio.timeout(_MAX_WAIT_SECONDS):
                    await self._semaphore.acquire()
            except TimeoutError as error:
                raise UnavailableError(self._busy) from error
            try:
                return await anyio.to_thread.run_sync(work, limiter=anyio.CapacityLimiter(1))
            finally:
                self._semaphore.release()


class BodyBudget:
    """Bounds the bytes of large bodies in memory: of all requests, and of one project half of that.

    For one event loop.
    """

    def __init__(self, max_bytes: int = 64 * MIB) -> None:
        self._max_bytes = max_bytes
        self._held: dict[str, int] = {}

    @contextmanager
    def hold(self, project_id: str) -> Iterator[Callable[[int], None]]:
        """Yield a function that counts bytes as they arrive; they are held until the block ends.

        It raises:
            TooManyRequestsError: when the project's share is passed.
            UnavailableError: when the whole budget is passed.
        """
        num_bytes = 0

        def count(more: int) -> None:
            nonlocal num_bytes
            if self._held.get(project_id, 0) + more > self._max_bytes // 2:
                raise TooManyRequestsError(
                    f"The large requests of this project that are open hold {self._max_bytes // 2 // MIB} "
                    "MiB; try again."
                )
            if sum(self._held.values()) + more > self._max_bytes:
                raise UnavailableError("Too many large requests are open right now; try again.")
            num_bytes += more
            self._held[project_id] = self._held.get(project_id, 0) + more

        try:
            yield count
        finally:
            if num_bytes:
                self._held[project_id] -= num_bytes
                if not self._held[project_id]:
                    del self._held[project_id]
