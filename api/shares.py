"""What a project may have a few of at the same time in one API process: open streams, tests of webhooks."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from luthier.core.errors import TooManyRequestsError


class ProjectLimit:
    """A number of places for each project.

    Args:
        limit: places of one project.
        what: what they are, for the refusal.
    """

    def __init__(self, limit: int, what: str) -> None:
        self._limit = limit
        self._what = what
        self._held: Counter[str] = Counter()

    def take(self, project_id: str) -> None:
        """Take a place, which `release` gives back.

        Raises:
            TooManyRequestsError: when the project holds all of its places.
        """
        if self._held[project_id] >= self._limit:
            raise TooManyRequestsError(
                f"This project has {self._limit} {self._what} at the same time already, which is the limit; "
                "wait until one has ended."
            )
        self._held[project_id] += 1

    def release(self, project_id: str) -> None:
        """Give a place back."""
        self._held[project_id] -= 1
        if not self._held[project_id]:
            del self._held[project_id]

    @contextmanager
    def hold(self, project_id: str) -> Iterator[None]:
        """Hold a place for a block.

        Raises:
            TooManyRequestsError: as `take`.
        """
        self.take(project_id)
        try:
            yield
        finally:
            self.release(project_id)
