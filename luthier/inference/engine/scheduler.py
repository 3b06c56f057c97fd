"""Continuous batching: which tokens of which sequences run next. Never tensors, nor how a model runs.

A batch has the next token of every sequence that answers and a bounded number of prompt tokens, so that
running answers never stall behind a long prompt. What waits is queued fairly, round-robin over projects, and
over models within one. What answers may have draft tokens. Only the engine's thread may call the scheduler.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from dataclasses import dataclass, replace
from weakref import ref

from luthier.core.errors import OutOfMemoryError, TooManyRequestsError
from luthier.inference.engine.block_pool import BlockPool, BlockTable
from luthier.inference.engine.sequence import ModelKey, Sequence
from luthier.modeling.protocols import AdapterId, AdapterInfo, RunnerLimits, TokenChunk

# Steps for which a long prompt may be deferred in favour of short ones.
_MAX_DEFERRALS = 4
# Tokens that kernels take of a prompt at a time.
_FEWEST_CHUNK_TOKENS = 16

# Lengths of the n-grams that are looked up; of those found the longest decides.
_FEWEST, _MOST = 2, 4
# Weight of one outcome in the estimated chance of the next.
_NEWS = 0.25
# The chance before the first outcome.
_START = 0.25
# Tokens before the first proposal that are indexed: each delays the step that it happens in.
_MOST_BEFORE = 4096

# The fixed cost of a step, in rows; and the cost of a second row, as a share of a step of one. Measured
# (docs/decisions/0035), with a margin.
_FIXED_ROWS, _SECOND_ROW = 8, 0.35
# Rows of a step with drafts; above, one more costs as much as it gains at best.
_MOST_ROWS = 16


def room_for_drafts(num_rows: int) -> int:
    """Return how many draft tokens a step of `num_rows` other rows takes."""
    return max(0, _MOST_ROWS - num_rows)


def least_chance(num_rows: int) -> float:
    """Return the least chance at which a draft is worth its row in a step of `num_rows` others."""
    return _SECOND_ROW if num_rows == 1 else num_rows / (num_rows + _FIXED_ROWS)


class NgramProposer:
    """Speculative decoding without a draft model: proposes an answer's next tokens from its text.

    Answers repeat themselves and their prompts: names, code, JSON, quotations. A step that runs draft tokens
    too, each as a row of its own, verifies them against the model's own choices and reads the weights once
    for all. The answer stays the same; only its number of steps falls. The idea and its yield: Saxena 2023,
    "Prompt Lookup Decoding"; Leviathan et al. 2023, arXiv 2211.17192, on verifying drafts in one step.

    `chance` is the estimated probability that the next one is right.

    Args:
        tokens: the prompt's and the answer's so far; negative ones are virtual.
    """

    def __init__(self, tokens: SequenceOf[int]) -> None:
        self._tokens: list[int] = []
        # Of each n-gram, the place of the token that followed it last.
        self._next_of: dict[tuple[int, ...], int] = {}
        # The place that the next token is proposed from, None for no proposal.
        self._source: int | None = None
        self.chance = _START
        for token in tokens[-_MOST_BEFORE:]:
            self._add(token)
        self._seek()

    def add(self, token: int) -> None:
        """Append the next token, and note whether the proposal was right."""
        if self._source is not None:
            is_right = self._tokens[self._source] == token
            self.chance += _NEWS * (is_right - self.chance)
        self._add(token)
        self._seek()

    def propose(self, most: int, *, least_chance: Callable[[int], float]) -> list[int]:
        """Return draft tokens as far as they are likely enough.

        Args:
            least_chance: that a draft and all before it are right, by the number of those before.
        """
        found: list[int] = []
        if self._source is None:
            return found
        chance = self.chance
        while len(found) < most and chance >= least_chance(len(found)):
            place = self._source + len(found)
            # What repeats at once is proposed from the drafts themselves.
            beyond = place - len(self._tokens)
            token = self._tokens[place] if beyond < 0 else found[beyond]
            if token < 0:
                break
            found.append(token)
            chance *= self.chance
        return found

    def _add(self, token: int) -> None:
        tokens, place = self._tokens, len(self._tokens)
        for count in range(_FEWEST, _MOST + 1):
            if place < count:
                break
            self._next_of[tuple(tokens[place - count :])] = place
        tokens.append(token)

    def _seek(self) -> None:
        tokens = self._tokens
        for count in range(min(_MOST, len(tokens)), _FEWEST - 1, -1):
            self._source = self._next_of.get(tuple(tokens[-count:]))
            if self._source is not None:
                return
        self._source = None


@dataclass(eq=False, slots=True)
class RunningSequence:
    """A sequence that has blocks.

    `tokens` are its virtual ones, as negative numbers, its prompt and its answer; the keys and values of the
    first `num_done` are in its blocks.
    """

    sequence: Sequence
    adapter: AdapterId | None
    num_virtual: int
    tokens: list[int]
    table: BlockTable
    num_done: int
    num_deferrals: int = 0
    # The number of the last batch that it was part of.
    last_batch: int = 0
    # Whether its blocks were freed.
    has_left: bool = False
    _proposer: NgramProposer | None = None

    @property
    def num_left(self) -> int:
        """Tokens that are still to be run, without virtual ones; 1 while it answers."""
        return len(self.tokens) - max(self.num_done, self.num_virtual)

    def add(self, token_id: int) -> None:
        """Append the next token of the answer."""
        self.tokens.append(token_id)
        if self._proposer is not None:
            self._proposer.add(token_id)

    @property
    def proposer(self) -> NgramProposer:
        """Proposes its next tokens; made when it is first asked for."""
        if self._proposer is None:
            self._proposer = NgramProposer(self.tokens)
        return self._proposer

    def next_chunk(self, count: int) -> TokenChunk:
        """Return its next tokens, virtual ones before them not counted."""
        begin = self.num_done
        first = begin if begin > self.num_virtual else self.num_virtual
        end = first + count
        if self.sequence.wants_prompt_scores:
            logits_from = first - begin
        else:
            logits_from = end - begin - (end == len(self.tokens))
        return TokenChunk(self.tokens[begin:end], begin, self.table.blocks, self.adapter, logits_from)


# A batch: each sequence with its tokens.
Scheduled = list[tuple[RunningSequence, TokenChunk]]


class Scheduler:
    """The running and the waiting sequences of one runner.

    `num_preempted` counts sequences whose blocks were taken.
    """

    def __init__(self, limits: RunnerLimits) -> None:
        self.limits = limits
        self.pool = BlockPool(limits.num_blocks, limits.block_size)
        self.running: list[RunningSequence] = []
        self.num_preempted = 0
        self._queue = FairQueue()
        self._num_batches = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence waits or runs."""
        return bool(self.running or self._queue)

    @property
    def num_waiting(self) -> int:
        """Sequences that do not run yet."""
        return len(self._queue)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        self._queue.add(sequence)

    def sweep(self) -> None:
        """Drop the sequences that are finished or cancelled."""
        self._queue.drop_done()
        gone = [one for one in self.running if one.sequence.is_done]
        for one in gone:
            self._release(one)
        if gone:
            self.running = [one for one in self.running if not one.has_left]

    def drain(self) -> list[Sequence]:
        """Remove all sequences and return them."""
        found = [one.sequence for one in self.running] + self._queue.drain()
        for one in self.running:
            self._release(one)
        self.running.clear()
        return found

    def schedule(self) -> Scheduled:
        """Admit what fits and return the next batch, empty when there is nothing to run."""
        self.sweep()
        self._admit()
        candidates = self.running
        if not self.limits.mixes_adapters and candidates:
            # The adapter whose sequence has not run for longest.
            adapter = min(candidates, key=lambda one: one.last_batch).adapter
            candidates = [one for one in candidates if one.adapter == adapter]
        batch = self._plan(candidates)
        self._num_batches += 1
        for one, _ in batch:
            one.last_batch = self._num_batches
        return batch

    def _admit(self) -> None:
        while len(self.running) < self.limits.max_sequences:
            sequence = self._queue.peek()
            if sequence is None:
                return
            info: AdapterInfo | None = sequence.served.adapter
            num_virtual = 0 if info is None else info.num_virtual_tokens
            tokens = sequence.interrupted_tokens
            if tokens is None:
                tokens = [*range(-1, -num_virtual - 1, -1), *sequence.prompt_ids]
            # Scores of all the prompt's tokens need all of them to run.
            shared = [] if sequence.wants_prompt_scores else tokens
            # Not between projects: the time to the first token would reveal another project's prompts.
            table = self.pool.start(sequence.key, shared, owner=sequence.project_id)
            # A block more than the prompt needs, and one for each running sequence, so that admission does
            # not lead to a preemption at once.
            spare = len(self.running)
            missing = -(-(len(tokens) + 1) // self.limits.block_size) - len(table.blocks)
            if self.pool.num_free - spare < missing:
                self.pool.release(table)
                if not self.running:
                    # No other will ever free blocks for it.
                    self._queue.pop().fail(_too_large(len(tokens)))
                    continue
                return
            self.pool.extend(table, len(tokens) + 1)
            self._queue.pop()
            sequence.interrupted_tokens = None
            num_done = table.num_cached * self.limits.block_size
            adapter = None if info is None else info.adapter
            self.running.append(RunningSequence(sequence, adapter, num_virtual, tokens, table, num_done))

    def _plan(self, candidates: list[RunningSequence]) -> Scheduled:
        batch, prompts = [], []
        for one in list(candidates):
            if one.num_left > 1:
                prompts.append(one)
            elif self._has_blocks(one):
                batch.append((one, one.next_chunk(1)))
        # One that was planned may have been preempted for one that came before it.
        batch = [(one, chunk) for one, chunk in batch if not one.has_left]
        prompts = [one for one in prompts if not one.has_left]
        if not prompts:
            return self._with_drafts(batch)
        return batch + self._plan_prompts(prompts, self.limits.max_logit_rows - len(batch))

    def _plan_prompts(self, prompts: list[RunningSequence], num_logit_rows: int) -> Scheduled:
        limits, budget = self.limits, self.limits.max_prefill_tokens
        batch: Scheduled = []
        has_short = any(one.num_left <= limits.short_prompt_tokens for one in prompts)
        for one in prompts:
            is_long = one.num_left > limits.short_prompt_tokens
            if is_long and has_short and one.num_deferrals < _MAX_DEFERRALS:
                one.num_deferrals += 1
                continue
            one.num_deferrals = 0
            most = max_long_chunk(limits, one.num_done) if is_long else limits.short_prompt_tokens
            count = min(one.num_left, budget, most)
            if one.sequence.wants_prompt_scores:
                count = min(count, num_logit_rows)
            if count <= 0:
                break
            batch.append((one, one.next_chunk(count)))
            budget -= count
            num_logit_rows -= batch[-1][1].num_logit_rows
        return batch

    def _with_drafts(self, batch: Scheduled) -> Scheduled:
        """Add tokens that are likely to come next, to be verified by the same step."""
        has_room = self.limits.max_draft_tokens and room_for_drafts(len(batch))
        if not has_room or any(one.sequence.wants_prompt_scores for one, _ in batch):
            return batch
        num_rows = len(batch)
        # The best predicted sequence first.
        for place in sorted(range(len(batch)), key=lambda place: -batch[place][0].proposer.chance):
            one, chunk = batch[place]
            drafts = self._propose(one, num_rows)
            if drafts:
                num_rows += len(drafts)
                token_ids = [*chunk.token_ids, *drafts]
                batch[place] = one, replace(chunk, token_ids=token_ids, num_draft_tokens=len(drafts))
        return batch

    def _propose(self, one: RunningSequence, num_rows: int) -> list[int]:
        """Return draft tokens of a sequence for a batch of `num_rows` other rows, with blocks allocated."""
        sequence = one.sequence
        num_left = sequence.options.max_tokens - sequence.num_completion_tokens - 1
        most = min(room_for_drafts(num_rows), num_left, self.limits.max_draft_tokens)
        # Drafts take no block that a sequence's next token may need.
        if most <= 0 or self.pool.num_free <= len(self.running):
            return []
        found = one.proposer.propose(most, least_chance=lambda count: least_chance(num_rows + count))
        return found if self.pool.extend(one.table, len(one.tokens) + len(found)) else []

    def _has_blocks(self, one: RunningSequence) -> bool:
        """Allocate a block for a sequence's next token; the youngest sequences are preempted if need be."""
        if one.has_left:
            return False
        while not self.pool.extend(one.table, len(one.tokens)):
            if len(self.running) == 1:
                # No other will ever free blocks for it.
                one.sequence.fail(_too_large(len(one.tokens)))
                self.sweep()
                return False
            self._preempt(self.running[-1])
            if one.has_left:
                return False
        return True

    def _preempt(self, one: RunningSequence) -> None:
        """Free a sequence's blocks and queue it first; its tokens will be run again."""
        self.num_preempted += 1
        self.running.remove(one)
        self._release(one)
        one.sequence.interrupted_tokens = one.tokens
        self._queue.add_first(one.sequence)

    def _release(self, one: RunningSequence) -> None:
        one.has_left = True
        self.pool.release(one.table)

    def advance(self, one: RunningSequence, num_tokens: int) -> None:
        """Note that keys and values of a sequence's next tokens are in its blocks."""
        one.num_done += num_tokens
        if one.num_done // self.limits.block_size > one.table.num_cached:
            self.pool.cache_full_blocks(one.table, one.tokens, one.num_done)

    @contextmanager
    def temporary_blocks(self, *lengths: int) -> Iterator[list[list[int]]]:
        """Allocate blocks for sequences of the given lengths, excluded from prefix caching and freed on exit.

        Raises:
            OutOfMemoryError: when there are too few blocks.
        """
        tables: list[BlockTable] = []
        try:
            for num_tokens in lengths:
                tables.append(BlockTable(None))
                while not self.pool.extend(tables[-1], num_tokens):
                    if not self.running:
                        raise _too_large(num_tokens)
                    self._preempt(self.running[-1])
            yield [table.blocks for table in tables]
        finally:
            for table in tables:
                self.pool.release(table)


def max_long_chunk(limits: RunnerLimits, num_done: int) -> int:
    """Return the size of a long prompt's next chunk: smaller the more tokens it attends to."""
    fitting = limits.max_chunk_pairs // (num_done + 1) // _FEWEST_CHUNK_TOKENS * _FEWEST_CHUNK_TOKENS
    return max(min(_FEWEST_CHUNK_TOKENS, limits.long_chunk_tokens), min(limits.long_chunk_tokens, fitting))


def _too_large(num_tokens: int) -> OutOfMemoryError:
    return OutOfMemoryError(
        f"The model server has too little memory for {num_tokens} tokens of one answer. An operator raises "
        "LUTHIER_MAX_CACHE_TOKENS."
    )


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
        if not any(sequence.is_done for sequence in self):
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
