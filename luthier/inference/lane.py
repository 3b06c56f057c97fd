"""Continuous batching over one packed base: rows of any mix of adapters join and leave between steps.

A step runs the next token of every row that answers, and a bounded stretch of prompts, so that running
answers never stall behind a long one. Only the engine's thread may call it.

Legend: R rows of logits, V vocabulary, L layers, N virtual tokens, H key heads, C head size.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from luthier.core.errors import OutOfMemoryError
from luthier.inference import sampler
from luthier.inference.drafts import least_chance, room_for_guesses
from luthier.inference.faults import log_fault, to_told
from luthier.inference.mail import hand_over
from luthier.inference.measures import StepMeasures
from luthier.inference.pages import Chain, PagePool
from luthier.inference.rows import Row, Work, score_prompts, take_guesses, with_guesses
from luthier.inference.sequence import Sequence
from luthier.inference.waiting import WaitingLine
from luthier.modeling.kernels.served_rows import PAGE_SIZE
from luthier.modeling.packed_adapter import PackedAdapter
from luthier.modeling.packed_llama import PackedLlama
from luthier.modeling.packed_work import Stretch

_LOG = logging.getLogger(__name__)

# Prompt tokens of one step: what they add to the time between two tokens of everybody else is what a small
# model takes for them.
MAX_PROMPT_TOKENS = 256
# Tokens of a prompt, or of what is left of one, that are run at once, and those of a step's stretch where
# more are left. Who comes beside a long prompt waits for the end of such a stretch, so these are fewer.
MAX_SHORT_TOKENS = 64
MAX_LONG_TOKENS = 48
# Steps that a long prompt may be passed over in favour of short ones.
_MAX_PASSED_OVER = 4


class Lane:
    """The rows of one packed base, and who waits for one.

    Args:
        model: the base.
        max_rows: rows that run at a time.
        max_draft_tokens: of an answer that are guessed at a time, to be checked in the step of the token
            before them.
    """

    def __init__(self, model: PackedLlama, *, max_rows: int, max_draft_tokens: int = 0) -> None:
        self.model = model
        self._max_rows = max_rows
        self._max_draft_tokens = max_draft_tokens
        self._pool = PagePool(model.pages.num_pages, PAGE_SIZE)
        self._waiting = WaitingLine()
        self._rows: list[Row] = []
        # The engine's own, once the lane has work.
        self.measures = StepMeasures()

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

    @property
    def growing_bytes(self) -> int:
        """Memory of pages that have none yet, and may take some."""
        return 0 if self._is_allocated else self._pool.num_growing * self.model.pages.page_bytes

    @property
    def spare_bytes(self) -> int:
        """Memory of pages that nobody uses, with what they may grow by, beyond what one long answer needs."""
        if self._is_allocated:
            return 0
        num_used = self._pool.num_warm - self._pool.num_unused
        num_spare = min(self._pool.num_free, self._pool.num_free + num_used - self._num_least_pages)
        return max(0, num_spare) * self.model.pages.page_bytes

    def limit_memory(self, num_bytes: int) -> None:
        """Let pages that nobody uses take no more than so much, beside what one long answer needs.

        Args:
            num_bytes: as `spare_bytes` counts them.
        """
        if self._is_allocated:
            return
        num_used = self._pool.num_warm - self._pool.num_unused
        num_pages = max(num_used, self._num_least_pages) + num_bytes // self.model.pages.page_bytes
        self.model.pages.discard(self._pool.limit_warm(num_pages))

    @property
    def _is_allocated(self) -> bool:
        """Whether all pages have memory from the start, as on a GPU."""
        return self.model.device.type != "cpu"

    @property
    def _num_least_pages(self) -> int:
        """Pages without which an answer of any length might fail."""
        return min(self._pool.num_pages, -(-self.model.context_length // PAGE_SIZE) + 1)

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
            write_virtual(self.model, adapter, chain.pages, num_shared)
        return Row(sequence, adapter, tokens, chain, max(num_shared, num_virtual))

    def _plan(self) -> Work:
        work = []
        for row in list(self._rows):
            if row.num_left == 1 and self._has_pages(row):
                work.append((row, self._stretch(row, 1)))
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
            count = min(row.num_left, budget, MAX_LONG_TOKENS if is_long else MAX_SHORT_TOKENS)
            if count <= 0:
                break
            work.append((row, self._stretch(row, count)))
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

    def _stretch(self, row: Row, count: int) -> Stretch:
        end = row.num_done + count
        return Stretch(
            row.tokens[row.num_done : end],
            row.num_done,
            row.chain.pages,
            None if row.adapter is None else row.adapter.described,
            end == len(row.tokens),
            row.sequence.wants_prompt_scores,
        )

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
            logits = self.model.step([stretch for _, stretch in work], on_launch=hand_over)
        except Exception as error:  # noqa: BLE001 - the thread must outlive any fault of one row
            if any(stretch.by_rows for _, stretch in work):
                # Nobody's answer shall end for what it would not have run without guesses.
                log_fault(_LOG, "A step with guesses", error)
                self._run([(row, self._stretch(row, 1) if one.by_rows else one) for row, one in work])
                return
            if len(work) == 1:
                self._fail(work[0][0], error)
                return
            # Whose fault it was is found by running each alone; what they wrote is written again.
            for one in work:
                self._run([one])
            return
        answering: Work = []
        places: list[int] = []
        num_chosen = 0
        for row, stretch in work:
            # Of guesses it is not known yet whether they are in their places.
            row.num_done += 1 if stretch.by_rows else len(stretch)
            self._pool.name(row.chain, row.tokens, row.num_done)
            if stretch.wants_logits:
                answering.append((row, stretch))
                places.append(num_chosen)
                num_chosen += len(stretch) if stretch.by_rows else 1
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

    def _fail(self, row: Row, error: Exception) -> None:
        row.sequence.fail(to_told(_LOG, "A step, whose answer ends with an error,", error))

    @torch.inference_mode()
    def prepare(self, adapter: PackedAdapter) -> None:
        """Run an adapter's input vectors, so that it has keys and values from then on.

        Args:
            adapter: laid out on this lane's base; one without input vectors is left as it is.

        Raises:
            OutOfMemoryError: when the pages are too few for them.
        """
        vectors_ND = adapter.embeddings_ND
        if vectors_ND is None:
            return
        with self.borrowing(len(vectors_ND)) as (pages,):
            for first in range(0, len(vectors_ND), MAX_PROMPT_TOKENS):
                part_ND = vectors_ND[first : first + MAX_PROMPT_TOKENS]
                self.model.step([Stretch(part_ND, first, pages, wants_logits=False)])
            adapter.take_key_values(*self.model.pages.read(pages, len(vectors_ND)))

    @contextmanager
    def borrowing(self, *lengths: int) -> Iterator[list[list[int]]]:
        """Lend pages whose content nobody is to share, for sequences of so many tokens.

        Args:
            *lengths: of the sequences.

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


@torch.inference_mode()
def write_virtual(model: PackedLlama, adapter: PackedAdapter, pages: list[int], start: int) -> None:
    """Put an adapter's keys and values from a position on into the first pages of a sequence.

    Args:
        model: the base.
        adapter: one without any changes nothing.
        pages: the sequence's.
        start: the first position that is written.
    """
    if adapter.keys_NLHC is None or adapter.values_NLHC is None:
        return
    positions = torch.arange(start, adapter.num_virtual_tokens)
    page_N = torch.tensor(pages)[positions // PAGE_SIZE]
    model.pages.write_all(
        page_N, positions % PAGE_SIZE, adapter.keys_NLHC[start:], adapter.values_NLHC[start:]
    )


def _too_large(num_tokens: int) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"The model server has too little memory for {num_tokens} tokens of one answer. An operator raises "
        "LUTHIER_MAX_CACHE_TOKENS."
    )
