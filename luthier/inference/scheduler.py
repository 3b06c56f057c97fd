"""Which rows run next. Holds no tensors and never calls a model.

Projects take turns; waiting sequences are grouped by model; a new arrival never waits for a running group to
end: its prompt is run at the next turn, and live groups then take one decode step each, in turn.
"""

import itertools
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import Any

from luthier.inference.engine.sequence import ModelKey, Sequence

# Of more than these the order of turns is forgotten.
_MAX_PROJECTS = 1024


@dataclass(eq=False)
class Group:
    """Rows of one model that are decoded together. `batch` is the runner's own state of these rows."""

    key: ModelKey
    sequences: list[Sequence]
    batch: Any

    @property
    def num_reserved_tokens(self) -> int:
        """Tokens that the group's cache may come to hold."""
        return _count_reserved(self.sequences)


@dataclass(frozen=True)
class Prefill:
    """Sequences of one model whose prompts are to be run now."""

    sequences: list[Sequence]


class Scheduler:
    """Order of work over waiting sequences and live groups.

    Args:
        max_live_rows: rows of all groups together.
        max_cache_tokens: tokens that the caches of all groups together may come to hold, padding counted;
            it bounds their memory. A sequence that exceeds it alone runs alone.
        max_prefill_tokens: rows times the longest prompt of one prefill (one row always fits); it bounds
            how long a prefill holds up the running groups.
    """

    def __init__(
        self, *, max_batch_rows: int, max_live_rows: int, max_cache_tokens: int, max_prefill_tokens: int
    ) -> None:
        self._max_batch_rows = max_batch_rows
        self._max_live_rows = max(max_live_rows, max_batch_rows)
        self._max_cache_tokens = max_cache_tokens
        self._max_prefill_tokens = max_prefill_tokens
        self._waiting: deque[Sequence] = deque()
        # Projects in the order in which they were served last.
        self._served: OrderedDict[str, None] = OrderedDict()
        self._groups: deque[Group] = deque()
        # Groups that still have a step to take before the next prefill may hold them up.
        self._num_turns_left = 0

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its prefill."""
        self._waiting.append(sequence)

    @property
    def has_work(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._waiting or self._groups)

    @property
    def num_waiting(self) -> int:
        """Sequences that have no row yet."""
        return len(self._waiting)

    @property
    def num_live_rows(self) -> int:
        """Rows of all groups."""
        return sum(len(group.sequences) for group in self._groups)

    @property
    def num_reserved_tokens(self) -> int:
        """Tokens that the caches of all groups may come to hold."""
        return sum(group.num_reserved_tokens for group in self._groups)

    @property
    def groups(self) -> list[Group]:
        """The live groups."""
        return list(self._groups)

    def next_work(self) -> Prefill | Group | None:
        """Return what to run now: prompts, one group's step, or None when nothing is to be done."""
        self._waiting = deque(sequence for sequence in self._waiting if not sequence.is_done)
        if self._waiting and (self._num_turns_left <= 0 or not self._groups):
            sequences = self._take_waiting()
            if sequences:
                self._num_turns_left = len(self._groups)
                return Prefill(sequences)
        if not self._groups:
            return None
        self._num_turns_left -= 1
        group = self._groups[0]
        self._groups.rotate(-1)
        return group

    def find_group(self, key: ModelKey, sequences: list[Sequence]) -> Group | None:
        """Return a live group of a model that can take these rows in, if there is one.

        Rows of unlike lengths pad each other; where that would break the budget they stay apart.
        """
        reserved = self.num_reserved_tokens
        for group in self._groups:
            merged = group.sequences + sequences
            if group.key != key or len(merged) > self._max_batch_rows:
                continue
            if reserved - group.num_reserved_tokens + _count_reserved(merged) <= self._max_cache_tokens:
                return group
        return None

    def start(self, group: Group) -> None:
        """Let a group take its turns."""
        self._groups.append(group)

    def end(self, group: Group) -> None:
        """Forget a group whose rows are all gone."""
        self._groups.remove(group)

    def drain(self) -> list[Sequence]:
        """Forget everything and return the sequences that waited or ran."""
        sequences = list(self._waiting)
        for group in self._groups:
            sequences.extend(group.sequences)
        self._waiting.clear()
        self._groups.clear()
        return sequences

    def _take_waiting(self) -> list[Sequence]:
        room = min(self._max_batch_rows, self._max_live_rows - self.num_live_rows)
        if room <= 0:
            return []
        waiting = self._in_turn()
        key = waiting[0].key
        num_free_tokens = self._max_cache_tokens - self.num_reserved_tokens
        taken: list[Sequence] = []
        longest = 0
        for sequence in waiting:
            if sequence.key != key:
                continue
            longest = max(longest, len(sequence.prompt_ids))
            if taken and (len(taken) + 1) * longest > self._max_prefill_tokens:
                break
            is_first_of_all = not taken and not self._groups
            if not is_first_of_all and _count_reserved([*taken, sequence]) > num_free_tokens:
                # Nobody overtakes it, or a long request would wait for as long as short ones come.
                break
            taken.append(sequence)
            if len(taken) == room:
                break
        chosen = set(map(id, taken))
        self._waiting = deque(sequence for sequence in self._waiting if id(sequence) not in chosen)
        for sequence in taken:
            self._served[sequence.project_id] = None
            self._served.move_to_end(sequence.project_id)
        while len(self._served) > _MAX_PROJECTS:
            self._served.popitem(last=False)
        return taken

    def _in_turn(self) -> list[Sequence]:
        """Return the waiting sequences by turns of projects; the one served longest ago is first."""
        lines: dict[str, list[Sequence]] = {}
        for sequence in self._waiting:
            lines.setdefault(sequence.project_id, []).append(sequence)
        turns = {project: turn for turn, project in enumerate(self._served)}
        order = sorted(lines, key=lambda project: turns.get(project, -1))
        rounds = itertools.zip_longest(*(lines[project] for project in order))
        return [sequence for one in rounds for sequence in one if sequence is not None]


def _count_reserved(sequences: list[Sequence]) -> int:
    # Every row of a batch is as wide as its widest.
    return len(sequences) * max((sequence.max_num_tokens for sequence in sequences), default=0)
