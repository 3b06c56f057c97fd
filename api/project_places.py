"""Places for work that is refused, not queued, beyond a few for each project and some for all."""

import math
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from luthier.core.errors import TooManyRequestsError, UnavailableError


class ProjectPlaces:
    """Places in this process. Threads may share it.

    Args:
        num_per_project: places of one project.
        num_in_all: places of all projects together.
        what: what takes one, for the refusal, such as "large files being checked".
    """

    def __init__(self, num_per_project: int, num_in_all: float = math.inf, *, what: str) -> None:
        self._num_per_project, self._num_in_all, self._what = num_per_project, num_in_all, what
        self._held: Counter[str] = Counter()
        self._lock = threading.Lock()

    def take(self, project_id: str) -> None:
        """Take a place, which `release` gives back.

        Raises:
            TooManyRequestsError: when the project holds all of its own.
            UnavailableError: when all projects together hold all.
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
        """Give a place back."""
        with self._lock:
            self._held[project_id] -= 1
            if not self._held[project_id]:
                del self._held[project_id]

    @contextmanager
    def hold(self, project_id: str) -> Iterator[None]:
        """Hold a place for a block; raises as `take` does."""
        self.take(project_id)
        try:
            yield
        finally:
            self.release(project_id)
