"""The scheduler keeps to what its runner can do. No model runs here."""

from dataclasses import replace

import pytest

from luthier.inference.engine.scheduler import Scheduled, Scheduler, max_long_chunk
from luthier.inference.engine.sequence import Choice
from luthier.modeling.protocols import AdapterInfo, RunnerLimits, TokenChunk
from tests.unit.inference.sequences import ask

LIMITS = RunnerLimits("float32", 100, 512, 16, 64, 1, 8, 256, 264)
LONG, SHORT = LIMITS.long_chunk_tokens, LIMITS.short_prompt_tokens


def prompt(num_tokens: int = 3) -> list[int]:
    return [5 + number % 90 for number in range(num_tokens)]


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


def test_a_runner_that_mixes_no_adapters_gets_one_a_batch_and_each_in_turn():
    scheduler = Scheduler(replace(LIMITS, mixes_adapters=False))
    adapters = [None, AdapterInfo(1, 0, 1), AdapterInfo(2, 0, 1)]
    asked = [ask(prompt(), 4, adapter=adapter).sequence for adapter in (*adapters, *adapters)]
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
def test_prompts_that_are_scored_get_no_more_rows_of_logits_than_the_runner_has(num_logit_rows):
    scheduler = Scheduler(replace(LIMITS, max_logit_rows=num_logit_rows))
    for _ in range(3):
        scheduler.add(ask(prompt(20), 4, num_prompt_logprobs=0).sequence)
    counts = []
    while any(one.num_left > 1 for one in scheduler.running) or not counts:
        batch = scheduler.schedule()
        for one, chunk in batch:
            scheduler.advance(one, len(chunk.token_ids))
        counts.append(sum(chunk.num_logit_rows for _, chunk in batch))
    assert max(counts) == num_logit_rows and sum(counts) >= 3 * 19


def test_virtual_tokens_come_before_the_prompt_and_count_against_no_budget():
    scheduler = Scheduler(replace(LIMITS, max_prefill_tokens=8))
    scheduler.add(ask(prompt(10), 4, adapter=AdapterInfo(1, 20, 1)).sequence)
    [(_, first)], [(_, second)] = run(scheduler), run(scheduler)
    assert list(first.token_ids) == [*range(-1, -21, -1), *range(5, 13)]
    assert (first.first_position, first.num_logit_rows) == (0, 0)
    assert (list(second.token_ids), second.first_position) == ([13, 14], 28)
    assert second.logits_from == 1
    # What another sequence has written is shared up to the last full block.
    scheduler.add(ask(prompt(10), 4, adapter=AdapterInfo(1, 20, 1)).sequence)
    batch = run(scheduler)
    shared: TokenChunk = batch[-1][1]
    assert shared.first_position == 16 and list(shared.token_ids[:4]) == [-17, -18, -19, -20]


@pytest.mark.parametrize(
    ("num_tokens", "chunks"),
    [
        (LONG + 1, [LONG + 1]),
        (SHORT, [SHORT]),
        (SHORT + 1, [LONG, SHORT + 1 - LONG]),
        (LONG + SHORT, [LONG, SHORT]),
    ],
)
def test_a_prompt_is_run_at_once_or_in_chunks_and_its_rest_at_once(num_tokens, chunks):
    scheduler = Scheduler(LIMITS)
    scheduler.add(ask(prompt(num_tokens), 1).sequence)
    found = []
    while scheduler.has_work:
        found += [len(chunk.token_ids) for _, chunk in run(scheduler)]
    assert found == chunks


def test_the_farther_a_long_prompt_has_come_the_fewer_of_its_tokens_run_at_once():
    counts = [max_long_chunk(LIMITS, num_done) for num_done in range(0, 9000, 100)]
    assert counts[0] == LONG and counts == sorted(counts, reverse=True)
    assert set(counts) == {16, 32}
    # 16 are what kernels take at a time; more of them stay below a number of pairs of tokens.
    assert all(count == 16 or count * 100 * place <= 1 << 16 for place, count in enumerate(counts))


def test_cancelled_and_drained_sequences_free_their_blocks():
    scheduler = Scheduler(replace(LIMITS, max_sequences=2))
    leaving, staying, waiting = asked = [ask(prompt(), 4).sequence for _ in range(3)]
    for sequence in asked:
        scheduler.add(sequence)
    run(scheduler)
    leaving.cancel()
    assert {one.sequence for one, _ in scheduler.schedule()} == {staying, waiting}
    late = ask(prompt(), 4).sequence
    scheduler.add(late)
    assert set(scheduler.drain()) == {staying, waiting, late}
    assert not scheduler.has_work and scheduler.pool.num_free == scheduler.pool.num_blocks
