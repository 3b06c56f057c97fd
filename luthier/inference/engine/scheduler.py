"""Continuous batching over one packed base: rows of any mix of adapters join and leave between steps.

A step runs the next token of every row that answers, and a bounded stretch of prompts, so that running
answers never stall behind a long one. Only the engine's thread may call it.

Legend: R rows of logits, V vocabulary.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from luthier.core.errors import OutOfMemoryError
from luthier.inference import sampler
from luthier.inference.drafts import least_chance, room_for_guesses
from luthier.inference.engine.block_memory import LaneMemory
from luthier.inference.engine.block_pool import Chain, PagePool
from luthier.inference.engine.fair_queue import WaitingLine
from luthier.inference.engine.sequence import Sequence
from luthier.inference.engine.step import (
    MAX_PROMPT_TOKENS,
    MAX_SHORT_TOKENS,
    Row,
    Work,
    most_of_long,
    next_stretch,
    score_prompts,
    take_guesses,
    with_guesses,
)
from luthier.inference.faults import log_fault, to_told
from luthier.inference.measures import StepMeasures
from luthier.modeling.kernels.served_rows import PAGE_SIZE
from luthier.modeling.packed_adapter import PackedAdapter
from luthier.modeling.packed_llama import PackedLlama

_LOG = logging.getLogger(__name__)

# Steps that a long prompt may be passed over in favour of short ones.
_MAX_PASSED_OVER = 4


class Lane:
    """The rows of one packed base, and who waits for one.

    Args:
        max_draft_tokens: of an answer that are guessed at a time, to be checked in the step of the token
            before them.
    """

    def __init__(self, model: PackedLlama, *, max_rows: int, max_draft_tokens: int = 0) -> None:
        self.model = model
        self._max_rows = max_rows
        self._max_draft_tokens = max_draft_tokens
        self._pool = PagePool(model.pages.num_pages, PAGE_SIZE)
        self.memory = LaneMemory(model, self._pool)
        self._waiting = WaitingLine()
        self._rows: list[Row] = []
        # The engine's own, once the lane has work.
        self.measures = StepMeasures()
        # Called right before the kernels of a step.
        self.on_launch: Callable[[], None] | None = None

    @property
    def has_work(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._rows or self._waiting)

    @property
    def num_waiting(self) -> int:
        """Sequences that have no row yet."""
        return len(self._waiting)

    @property
    def num_rows(self) -> int:
        """Sequences that have a row."""
        return len(self._rows)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for a row."""
        self._waiting.add(sequence)

    def sweep(self) -> None:
        """Let go of the rows, and of those who wait, whose answers are not wanted any more."""
        self._waiting.drop_done()
        gone = [row for row in self._rows if row.sequence.is_done]
        for row in gone:
            self._release(row)
        if gone:
            self._rows = [row for row in self._rows if not row.has_left]

    def drain(self) -> list[Sequence]:
        """Forget everybody and return them."""
        found = [row.sequence for row in self._rows] + self._waiting.drain()
        for row in self._rows:
            self._release(row)
        self._rows.clear()
        return found

    def forget(self, sequence_key: object) -> None:
        """Let nobody share pages of an adapter that leaves the memory."""
        self._pool.forget(sequence_key)

    def step(self) -> bool:
        """Run the next tokens of all rows that have their turn.

        Returns:
            Whether there were any.
        """
        self.sweep()
        self._admit()
        work = self._plan()
        if work:
            self._run(work)
            self.sweep()
        return bool(work)

    def _admit(self) -> None:
        while len(self._rows) < self._max_rows:
            sequence = self._waiting.peek()
            if sequence is None:
                return
            adapter: PackedAdapter | None = sequence.served.adapter
            tokens = sequence.interrupted_tokens
            if tokens is None:
                num_virtual = 0 if adapter is None else adapter.num_virtual_tokens
                tokens = [*range(-1, -num_virtual - 1, -1), *sequence.prompt_ids]
            # Who wants to know of every token of the prompt has to run every one.
            shared = [] if sequence.wants_prompt_scores else tokens
            # Not between projects: how soon an answer comes would tell what another one asks.
            chain = self._pool.start(sequence.key, shared, owner=sequence.project_id)
            # A page more than the prompt needs, and one for each row that runs, so that nobody is let in
            # only to push somebody else out.
            spare = len(self._rows)
            if self._pool.num_free - spare < -(-(len(tokens) + 1) // PAGE_SIZE) - len(chain.pages):
                self._pool.release(chain)
                if not self._rows:
                    # Nothing will ever leave for it.
                    self._waiting.pop().fail(_too_large(len(tokens)))
                    continue
                return
            self._pool.extend(chain, len(tokens) + 1)
            self._waiting.pop()
            sequence.interrupted_tokens = None
            self._rows.append(self._begin(sequence, adapter, tokens, chain))

    def _begin(
        self, sequence: Sequence, adapter: PackedAdapter | None, tokens: list[int], chain: Chain
    ) -> Row:
        num_shared = chain.num_named * PAGE_SIZE
        num_virtual = 0 if adapter is None else adapter.num_virtual_tokens
        if adapter is not None and num_shared < num_virtual:
            adapter.write_virtual(self.model.pages, chain.pages, num_shared)
        return Row(sequence, adapter, tokens, chain, max(num_shared, num_virtual))

    def _plan(self) -> Work:
        work = []
        for row in list(self._rows):
            if row.num_left == 1 and self._has_pages(row):
                work.append((row, next_stretch(row, 1)))
        # A row that was planned may have lost its pages to one that came before it.
        work = [(row, stretch) for row, stretch in work if not row.has_left]
        budget = MAX_PROMPT_TOKENS
        prompts = [row for row in self._rows if row.num_left > 1]
        if not prompts:
            return self._with_guesses(work)
        short = [row for row in prompts if row.num_left <= MAX_SHORT_TOKENS]
        for row in prompts:
            is_long = row.num_left > MAX_SHORT_TOKENS
            if is_long and short and row.num_passed_over < _MAX_PASSED_OVER:
                row.num_passed_over += 1
                continue
            row.num_passed_over = 0
            count = min(row.num_left, budget, most_of_long(row.num_done) if is_long else MAX_SHORT_TOKENS)
            if count <= 0:
                break
            work.append((row, next_stretch(row, count)))
            budget -= count
        return work

    def _with_guesses(self, work: Work) -> Work:
        """Let tokens that are likely to come next run with those that are known."""
        has_room = self._max_draft_tokens and room_for_guesses(len(work))
        if not has_room or any(stretch.wants_all_logits for _, stretch in work):
            return work
        guesses: dict[Row, list[int]] = {}
        num_rows = len(work)
        # Whoever is guessed best has the room first.
        for row, _ in sorted(work, key=lambda one: -one[0].drafter.chance):
            guesses[row] = self._guess(row, num_rows)
            num_rows += len(guesses[row])
        return [
            (row, with_guesses(stretch, own) if (own := guesses[row]) else stretch) for row, stretch in work
        ]

    def _guess(self, row: Row, num_rows: int) -> list[int]:
        """Return a row's guesses for a step that has so many rows already, and pages for them."""
        sequence = row.sequence
        num_left = sequence.options.max_tokens - sequence.num_completion_tokens - 1
        most = min(room_for_guesses(num_rows), num_left, self._max_draft_tokens)
        # Nobody's next token shall lack a page for what may be none.
        if most <= 0 or self._pool.num_free <= len(self._rows):
            return []
        found = row.drafter.guess(most, least_chance=lambda count: least_chance(num_rows + count))
        return found if self._pool.extend(row.chain, len(row.tokens) + len(found)) else []

    def _has_pages(self, row: Row) -> bool:
        """Make sure that a row has a page for its next token, taken from the youngest row if need be."""
        if row.has_left:
            return False
        while not self._pool.extend(row.chain, len(row.tokens)):
            if len(self._rows) == 1:
                # Nobody will ever leave for it.
                row.sequence.fail(_too_large(len(row.tokens)))
                self.sweep()
                return False
            self._interrupt(self._rows[-1])
            if row.has_left:
                return False
        return True

    def _interrupt(self, row: Row) -> None:
        """Take a row's pages; it waits before all others and is run again up to where it was."""
        self.measures.num_preempted += 1
        self._rows.remove(row)
        self._release(row)
        row.sequence.interrupted_tokens = row.tokens
        self._waiting.add_first(row.sequence)

    def _release(self, row: Row) -> None:
        row.has_left = True
        self._pool.release(row.chain)

    def _run(self, work: Work) -> None:
        try:
            logits = self.model.step([stretch for _, stretch in work], on_launch=self.on_launch)
        except Exception as error:  # noqa: BLE001 - the thread must outlive any fault of one row
            self._run_apart(work, error)
            return
        answering: Work = []
        places: list[int] = []
        num_chosen = 0
        for row, stretch in work:
            count = (len(stretch) if stretch.by_rows else 1) if stretch.wants_logits else 0
            # Of guesses it is not known yet whether they are in their places.
            row.num_done += 1 if stretch.by_rows else len(stretch)
            if not row.sequence.is_finished:
                self._pool.name(row.chain, row.tokens, row.num_done)
                if count:
                    answering.append((row, stretch))
                    places.append(num_chosen)
            num_chosen += count
        if any(stretch.wants_all_logits for _, stretch in work):
            logits = score_prompts(work, logits)
        sequences = [row.sequence for row, _ in answering]
        self.measures.count_step(len(work), sequences)
        choices = sampler.choose(logits, sequences, places)
        for (row, stretch), choice, place in zip(answering, choices, places, strict=True):
            if row.sequence.is_done:
                continue
            row.sequence.accept(choice)
            row.add(choice.token_id)
            if stretch.by_rows:
                num_right = take_guesses(row, stretch, choice, logits, place)
                self._pool.name(row.chain, row.tokens, row.num_done)
                self.measures.count_guesses(len(stretch) - 1, num_right)

    def _run_apart(self, work: Work, error: Exception) -> None:
        """Find whose fault a step's failure was by running each alone; what they wrote is written again."""
        if any(stretch.by_rows for _, stretch in work):
            # Nobody's answer shall end for what it would not have run without guesses.
            log_fault(_LOG, "A step with guesses", error)
            self._run([(row, next_stretch(row, 1) if one.by_rows else one) for row, one in work])
        elif len(work) > 1:
            for one in work:
                if not one[0].sequence.is_finished:
                    self._run([one])
        else:
            self._fail(work[0][0], error)

    def _fail(self, row: Row, error: Exception) -> None:
        row.sequence.fail(to_told(_LOG, "A step, whose answer ends with an error,", error))

    @contextmanager
    def borrowing(self, *lengths: int) -> Iterator[list[list[int]]]:
        """Lend pages whose content nobody is to share, for sequences of so many tokens.

        Yields:
            The pages of each.

        Raises:
            OutOfMemoryError: when the pages are too few.
        """
        chains: list[Chain] = []
        try:
            for num_tokens in lengths:
                chains.append(Chain(None))
                while not self._pool.extend(chains[-1], num_tokens):
                    if not self._rows:
                        raise _too_large(num_tokens)
                    self._interrupt(self._rows[-1])
            yield [chain.pages for chain in chains]
        finally:
            for chain in chains:
                self._pool.release(chain)


def _too_large(num_tokens: int) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"The model server has too little memory for {num_tokens} tokens of one answer. An operator raises "
        "LUTHIER_MAX_CACHE_TOKENS."
    )
