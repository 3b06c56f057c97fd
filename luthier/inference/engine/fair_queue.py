"""The queue of waiting sequences: round-robin over projects, and over models within one. No tensors."""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator
from weakref import ref

from luthier.core.errors import TooManyRequestsError
from luthier.inference.engine.sequence import ModelKey, Sequence

_ModelQueues = OrderedDict[ModelKey, deque[Sequence]]


class WaitingShares:
    """Limits the waiting sequences of each project. For the event loop's thread.

    Below `max_waiting` in all every project is admitted. Above, a project that has its share or more is
    refused and others are admitted, so that a project that fills the queue does not keep others out.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        # A sequence holds its model's weights, which must be able to leave when it is done.
        self._submitted: list[ref[Sequence]] = []

    def take(self, sequences: list[Sequence], num_waiting: int) -> None:
        """Admit the sequences of one request, all of one project.

        Raises:
            TooManyRequestsError: when the queue is full for this project.
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


class FairQueue:
    """Sequences that wait for blocks. A thousand requests of one project delay another's by one turn."""

    def __init__(self) -> None:
        self._projects: OrderedDict[str, _ModelQueues] = OrderedDict()
        # Served before all others.
        self._preempted: deque[Sequence] = deque()
        # Stored, not counted: other threads read it while the engine's changes the queue.
        self._num_waiting = 0

    def __len__(self) -> int:
        return self._num_waiting

    def __bool__(self) -> bool:
        return bool(self._projects or self._preempted)

    def __iter__(self) -> Iterator[Sequence]:
        yield from self._preempted
        for models in self._projects.values():
            for waiting in models.values():
                yield from waiting

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence behind those of its project and model."""
        models = self._projects.setdefault(sequence.project_id, OrderedDict())
        models.setdefault(sequence.key, deque()).append(sequence)
        self._num_waiting += 1

    def add_first(self, sequence: Sequence) -> None:
        """Queue a preempted sequence before all others."""
        self._preempted.appendleft(sequence)
        self._num_waiting += 1

    def peek(self) -> Sequence | None:
        """Return the next sequence, None when the queue is empty; finished and cancelled ones are dropped."""
        self.drop_done()
        if self._preempted:
            return self._preempted[0]
        if not self._projects:
            return None
        models = next(iter(self._projects.values()))
        return next(iter(models.values()))[0]

    def pop(self) -> Sequence:
        """Remove what `peek` returned; its project and model move to the end of the order."""
        self._num_waiting -= 1
        if self._preempted:
            return self._preempted.popleft()
        project, models = next(iter(self._projects.items()))
        key, waiting = next(iter(models.items()))
        sequence = waiting.popleft()
        models.move_to_end(key)
        self._projects.move_to_end(project)
        if not waiting:
            del models[key]
        if not models:
            del self._projects[project]
        return sequence

    def drop_done(self) -> None:
        """Drop finished and cancelled sequences."""
        if not self or not any(sequence.is_done for sequence in self):
            return
        self._preempted = deque(sequence for sequence in self._preempted if not sequence.is_done)
        for project, models in list(self._projects.items()):
            for key, waiting in list(models.items()):
                models[key] = deque(sequence for sequence in waiting if not sequence.is_done)
                if not models[key]:
                    del models[key]
            if not models:
                del self._projects[project]
        self._num_waiting = sum(1 for _ in self)

    def drain(self) -> list[Sequence]:
        """Empty the queue and return its sequences."""
        waiting = list(self)
        self._projects.clear()
        self._preempted.clear()
        self._num_waiting = 0
        return waiting
