"""The scheduler keeps to what its runner can do. No model runs here."""

from types import SimpleNamespace

import pytest

from luthier.inference.engine.scheduler import Scheduled, Scheduler
from luthier.inference.engine.sequence import Choice, SamplingOptions, Sequence
from luthier.modeling.protocols import AdapterInfo, RunnerLimits, TokenChunk


class Text:
    def push(self, token_id: int) -> str:
        return "x"

    def flush(self) -> str:
        return ""


def make_limits(**changes: int) -> RunnerLimits:
    values = {
        "vocabulary_size": 100,
        "context_length": 512,
        "block_size": 16,
        "num_blocks": 64,
        "block_bytes": 1,
        "max_sequences": 8,
        "max_prefill_tokens": 256,
        "max_logit_rows": 264,
    }
    return RunnerLimits("float32", **(values | changes))  # type: ignore[arg-type]


def ask(
    adapter: AdapterInfo | None = None, *, num_tokens: int = 3, num_prompt_logprobs: int | None = None
) -> Sequence:
    return Sequence(
        key=("base", None if adapter is None else str(adapter.adapter)),
        served=SimpleNamespace(adapter=adapter),
        prompt_ids=[5 + number % 90 for number in range(num_tokens)],
        options=SamplingOptions(4, temperature=0.0, num_prompt_logprobs=num_prompt_logprobs),
        decoder=Text(),
        stop_token_ids=frozenset(),
        emit=lambda _: None,
    )


def run(scheduler: Scheduler) -> Scheduled:
    """Take the next batch and answer each sequence in it with token 7."""
    batch = scheduler.schedule()
    for one, chunk in batch:
        scheduler.advance(one, len(chunk.token_ids))
        if one.num_done == len(one.tokens):
            one.sequence.accept(Choice(7))
            one.add(7)
    scheduler.sweep()
    return batch


def test_a_runner_that_mixes_no_adapters_gets_one_a_batch_and_each_in_turn() -> None:
    scheduler = Scheduler(make_limits(mixes_adapters=False))
    adapters = [None, AdapterInfo(1, 0, 1), AdapterInfo(2, 0, 1)]
    asked = [ask(adapter) for adapter in (*adapters, *adapters)]
    for sequence in asked:
        scheduler.add(sequence)
    seen = []
    while scheduler.has_work:
        chunks = [chunk for _, chunk in run(scheduler)]
        [adapter] = {chunk.adapter for chunk in chunks}
        seen.append(adapter)
        assert len(chunks) == 2
    assert all(sequence.num_completion_tokens == 4 for sequence in asked)
    assert [sorted(seen[first : first + 3], key=str) for first in range(0, 12, 3)] == [[1, 2, None]] * 4


@pytest.mark.parametrize("num_logit_rows", [4, 9])
def test_prompts_that_are_scored_get_no_more_rows_of_logits_than_the_runner_has(num_logit_rows: int) -> None:
    scheduler = Scheduler(make_limits(max_logit_rows=num_logit_rows))
    for _ in range(3):
        scheduler.add(ask(num_tokens=20, num_prompt_logprobs=0))
    counts = []
    while any(one.num_left > 1 for one in scheduler.running) or not counts:
        batch = scheduler.schedule()
        for one, chunk in batch:
            scheduler.advance(one, len(chunk.token_ids))
        counts.append(sum(chunk.num_logit_rows for _, chunk in batch))
    assert max(counts) == num_logit_rows and sum(counts) >= 3 * 19


def test_virtual_tokens_come_before_the_prompt_and_count_against_no_budget() -> None:
    scheduler = Scheduler(make_limits(max_prefill_tokens=8))
    scheduler.add(ask(AdapterInfo(1, 20, 1), num_tokens=10))
    [(_, first)], [(_, second)] = run(scheduler), run(scheduler)
    assert list(first.token_ids) == [*range(-1, -21, -1), *range(5, 13)]
    assert (first.first_position, first.num_logit_rows) == (0, 0)
    assert (list(second.token_ids), second.first_position) == ([13, 14], 28)
    assert second.logits_from == 1
    # What another sequence has written is shared up to the last full block.
    scheduler.add(ask(AdapterInfo(1, 20, 1), num_tokens=10))
    batch = run(scheduler)
    shared: TokenChunk = batch[-1][1]
    assert shared.first_position == 16 and list(shared.token_ids[:4]) == [-17, -18, -19, -20]
