"""One runner and its scheduler: schedule, execute, sample, deliver. Never which model it is.

Only the engine's thread may call it.
"""

import logging
from collections.abc import Callable

import torch

from luthier.inference.engine import sampler
from luthier.inference.engine.block_pool import BlockMemory
from luthier.inference.engine.error_reporting import log_fault, to_client_error
from luthier.inference.engine.metrics import StepMetrics
from luthier.inference.engine.sampler import score_chunk
from luthier.inference.engine.scheduler import RunningSequence, Scheduled, Scheduler
from luthier.inference.engine.sequence import Choice, ModelKey
from luthier.modeling.protocols import AdapterInfo, Logits, ModelRunner, ScheduledBatch, TokenChunk

_LOG = logging.getLogger(__name__)


class BatchExecutor:
    """Runs a scheduler's batches on its runner."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.scheduler = Scheduler(runner.limits)
        self.memory = BlockMemory(runner, self.scheduler.pool)
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
                _score(one, chunk, logits, begin, end)
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


@torch.inference_mode()
def _score(one: RunningSequence, chunk: TokenChunk, logits: Logits, begin: int, end: int) -> None:
    first = chunk.first_position + chunk.logits_from - one.num_virtual
    score_chunk(one.sequence, first, logits.rows(range(begin, end)))


def _verify_drafts(one: RunningSequence, chunk: TokenChunk, choice: Choice, logits: Logits, row: int) -> int:
    """Accept the choices after drafts, as long as these are the tokens that were chosen.

    Returns:
        How many drafts were right.
    """
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
