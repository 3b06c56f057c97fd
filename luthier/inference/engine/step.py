"""One runner and its scheduler: schedule, execute, sample, deliver. Never which model it is.

Only the engine's thread may call it.
"""

import logging
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable

from luthier.inference.engine import sampler
from luthier.inference.engine.error_reporting import log_fault, to_client_error
from luthier.inference.engine.sampler import score_chunk
from luthier.inference.engine.scheduler import RunningSequence, Scheduled, Scheduler
from luthier.inference.engine.sequence import Choice, ModelKey, Sequence
from luthier.modeling.protocols import AdapterInfo, Logits, ModelRunner, ScheduledBatch, TokenChunk

_LOG = logging.getLogger(__name__)

_ROW_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128)
_FIRST_TOKEN_BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_BETWEEN_BOUNDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class Histogram:
    """How often values lay at or below each of some bounds, and their sum."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        # One more than there are bounds, for what is above them all.
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count a value, as often as it came."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


class StepMetrics:
    """Counts over all steps of the process.

    The engine's thread alone writes, once a step, and takes no lock; a reader may see a step half counted.
    """

    def __init__(self) -> None:
        self.num_steps = 0
        self.num_tokens = 0
        self.num_prompt_tokens = 0
        self.num_preempted = 0
        self.num_drafts = self.num_right_drafts = 0
        self.rows = Histogram(_ROW_BOUNDS)
        self.first_token_seconds = Histogram(_FIRST_TOKEN_BOUNDS)
        self.between_tokens_seconds = Histogram(_BETWEEN_BOUNDS)

    def count_step(self, num_rows: int, sequences: Iterable[Sequence], now: float | None = None) -> None:
        """Count a step before its tokens are handed to the sequences; those that are done get none."""
        now = time.monotonic() if now is None else now
        self.num_steps += 1
        self.rows.observe(num_rows)
        since, times = 0.0, 0
        for sequence in sequences:
            if sequence.is_finished or sequence.is_cancelled:
                continue
            self.num_tokens += 1
            if sequence.num_completion_tokens == 0:
                self.num_prompt_tokens += len(sequence.prompt_ids)
                self.first_token_seconds.observe(now - sequence.made_at)
            elif sequence.last_token_at == since:
                times += 1
            else:
                # Most rows got their last token in the same step: they are counted together.
                if times:
                    self.between_tokens_seconds.observe(now - since, times)
                since, times = sequence.last_token_at, 1
            sequence.last_token_at = now
        if times:
            self.between_tokens_seconds.observe(now - since, times)

    def count_drafts(self, num_drafts: int, num_right: int) -> None:
        """Count draft tokens; the right ones came with the token before them."""
        self.num_drafts += num_drafts
        self.num_right_drafts += num_right
        self.num_tokens += num_right
        self.between_tokens_seconds.observe(0.0, num_right)


class BatchExecutor:
    """Runs a scheduler's batches on its runner."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.scheduler = Scheduler(runner.limits)
        # Replaced by the engine's own once there is work.
        self.measures = StepMetrics()
        # Called right before the kernels of a step.
        self.on_launch: Callable[[], None] | None = None

    def remove_adapter(self, key: ModelKey, info: AdapterInfo) -> None:
        """Free an adapter that no request needs, and drop its cached blocks."""
        self.scheduler.sweep()
        self.scheduler.pool.forget(key)
        self.runner.remove_adapter(info.adapter)

    def step(self) -> bool:
        """Run the next batch; return whether there was one."""
        batch = self.scheduler.schedule()
        self.measures.num_preempted += self.scheduler.num_preempted
        self.scheduler.num_preempted = 0
        if batch:
            self._run(batch)
            self.scheduler.sweep()
        return bool(batch)

    def _run(self, batch: Scheduled) -> None:
        try:
            chunks = ScheduledBatch([chunk for _, chunk in batch])
            logits = self.runner.execute(chunks, on_launch=self.on_launch)
        except Exception as error:  # noqa: BLE001 - the thread must outlive any fault of one sequence
            self._run_separately(batch, error)
            return
        answering: Scheduled = []
        rows: list[int] = []
        end = 0
        for one, chunk in batch:
            begin, end = end, end + chunk.num_logit_rows
            # Whether drafts are right is not known yet.
            num_known = len(chunk.token_ids) - chunk.num_draft_tokens
            if one.sequence.is_finished:
                one.num_done += num_known
                continue
            self.scheduler.advance(one, num_known)
            if one.sequence.wants_prompt_scores:
                first = chunk.first_position + chunk.logits_from - one.num_virtual
                score_chunk(one.sequence, first, logits.rows(range(begin, end)))
            if one.num_done == len(one.tokens):
                answering.append((one, chunk))
                rows.append(end - 1 - chunk.num_draft_tokens)
        self._sample(batch, answering, rows, logits)

    def _sample(self, batch: Scheduled, answering: Scheduled, rows: list[int], logits: Logits) -> None:
        sequences = [one.sequence for one, _ in answering]
        self.measures.count_step(len(batch), sequences)
        choices = sampler.choose(logits, sequences, rows)
        for (one, chunk), choice, row in zip(answering, choices, rows, strict=True):
            if one.sequence.is_done:
                continue
            one.sequence.accept(choice)
            one.add(choice.token_id)
            if chunk.num_draft_tokens:
                num_right = _verify_drafts(one, chunk, choice, logits, row)
                self.scheduler.advance(one, num_right)
                self.measures.count_drafts(chunk.num_draft_tokens, num_right)

    def _run_separately(self, batch: Scheduled, error: Exception) -> None:
        """Find the sequence that made a step fail by running each alone; what they wrote is overwritten."""
        if any(chunk.num_draft_tokens for _, chunk in batch):
            # No answer may fail because of its drafts.
            log_fault(_LOG, "A step with draft tokens", error)
            self._run([(one, one.next_chunk(1) if chunk.num_draft_tokens else chunk) for one, chunk in batch])
        elif len(batch) > 1:
            for pair in batch:
                if not pair[0].sequence.is_finished:
                    self._run([pair])
        else:
            batch[0][0].sequence.fail(
                to_client_error(_LOG, "A step, whose answer ends with an error,", error)
            )


def _verify_drafts(one: RunningSequence, chunk: TokenChunk, choice: Choice, logits: Logits, row: int) -> int:
    """Accept the choices after drafts that are the tokens chosen, and return how many drafts are."""
    num_right = 0
    for draft in chunk.token_ids[-chunk.num_draft_tokens :]:
        if one.sequence.is_done or choice.token_id != draft:
            break
        (choice,) = sampler.choose(logits, [one.sequence], [row + num_right + 1])
        if one.sequence.is_done:
            break
        num_right += 1
        one.sequence.accept(choice)
        one.add(choice.token_id)
    return num_right
