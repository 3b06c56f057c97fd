"""Bounds the memory of large request bodies. Reads no body."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from luthier.core.errors import TooManyRequestsError, UnavailableError
from luthier.core.settings import MIB

# Read of a body before its key is looked up, and not counted: connections bound how many there are.
MAX_UNCOUNTED_BYTES = 16 * 1024


class BodyBudget:
    """The bytes of large bodies in memory: over all requests, and of one project half of that.

    For one event loop.
    """

    def __init__(self, max_bytes: int = 64 * MIB) -> None:
        self._max_bytes = max_bytes
        self._held: dict[str, int] = {}

    @contextmanager
    def hold(self, project_id: str) -> Iterator[Callable[[int], None]]:
        """Yield what a body's bytes are counted by as they come; they are held until the block ends.

        Raises:
            TooManyRequestsError: from a count that passes the project's share.
            UnavailableError: from a count that passes the budget.
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
