"""Who waits, in a fair order: projects take turns, and in each project its models do. No tensors."""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from weakref import ref

from luthier.core.errors import TooManyRequestsError
from luthier.inference.engine.sequence import ModelKey, Sequence

_Line = OrderedDict[ModelKey, deque[Sequence]]


class WaitingShares:
    """How many places among the waiting a project may have. For the event loop's thread.

    Below `max_waiting` in all any project may wait. Beyond, one that has a share of them or more is refused,
    and others are taken, so that none of them is kept out by a project that fills the places.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        # A sequence holds its model's weights, which must be able to leave when it is done.
        self._submitted: list[ref[Sequence]] = []

    def take(self, sequences: list[Sequence], num_waiting: int) -> None:
        """Give the sequences of one request, which are one project's, their places.

        Args:
            num_waiting: sequences of all projects that have no row yet.

        Raises:
            TooManyRequestsError: when there is no place for them.
        """
        unanswered = [
            one
            for reference in self._submitted
            if (one := reference()) is not None and not one.is_done and not one.num_completion_tokens
        ]
        if num_waiting > 0 and num_waiting + len(sequences) > self._max_waiting:
            waiting = Counter(one.project_id for one in unanswered)
            own = waiting[sequences[0].project_id]
            share = self._max_waiting // max(2, len(waiting))
            is_over = own > 0 and own + len(sequences) > share
            if is_over or num_waiting + len(sequences) > 2 * self._max_waiting:
                raise TooManyRequestsError(
                    f"{num_waiting} requests are waiting for the model server, and {own} of this project have"
                    " no answer yet; try again when some have ended."
                )
        self._submitted = [ref(one) for one in (*unanswered, *sequences)]


class WaitingLine:
    """Sequences that wait for a row. One project's thousand requests hold up another's one by one turn."""

    def __init__(self) -> None:
        self._projects: OrderedDict[str, _Line] = OrderedDict()
        # Those that had a row and lost it, to be served before all others.
        self._returned: deque[Sequence] = deque()
        # Kept, not counted: other threads ask for it while the engine's changes the lines.
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __bool__(self) -> bool:
        return bool(self._projects or self._returned)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._returned
        for line in self._projects.values():
            for waiting in line.values():
                yield from waiting

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait behind those of its project and model."""
        line = self._projects.setdefault(sequence.project_id, OrderedDict())
        line.setdefault(sequence.key, deque()).append(sequence)
        self._num_waiting += 1

    def add_first(self, sequence: Sequence) -> None:
        """Let a sequence that lost its row wait before all others."""
        self._returned.appendleft(sequence)
        self._num_waiting += 1

    def peek(self) -> Sequence | None:
        """Return whose turn it is, None when nobody waits; those that want no answer any more are dropped."""
        self.drop_done()
        if self._returned:
            return self._returned[0]
        if not self._projects:
            return None
        line = next(iter(self._projects.values()))
        return next(iter(line.values()))[0]

    def pop(self) -> Sequence:
        """Take whom `peek` returned; his project and model are last in turn now."""
        self._num_waiting -= 1
        if self._returned:
            return self._returned.popleft()
        project, line = next(iter(self._projects.items()))
        key, waiting = next(iter(line.items()))
        sequence = waiting.popleft()
        line.move_to_end(key)
        self._projects.move_to_end(project)
        if not waiting:
            del line[key]
        if not line:
            del self._projects[project]
        return sequence

    def drop_done(self) -> None:
        """Forget those that want no answer any more, wherever they stand."""
        if not self or not any(sequence.is_done for sequence in self):
            return
        self._returned = deque(sequence for sequence in self._returned if not sequence.is_done)
        for project, line in list(self._projects.items()):
            for key, waiting in list(line.items()):
                line[key] = deque(sequence for sequence in waiting if not sequence.is_done)
                if not line[key]:
                    del line[key]
            if not line:
                del self._projects[project]
        self._num_waiting = sum(1 for _ in self)

    def drain(self) -> list[Sequence]:
        """Forget everybody and return them."""
        waiting = list(self)
        self._projects.clear()
        self._returned.clear()
        self._num_waiting = 0
        return waiting
