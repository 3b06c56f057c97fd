"""Scheduler and engine over a runner whose every token is known beforehand."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.errors import ArtifactCorruptError, TooManyRequestsError, UnavailableError
from luthier.inference.engine.engine import MAX_LIVE_BATCHES, Engine, EngineCore, _Call
from luthier.inference.engine.sequence import (
    Failure,
    Finish,
    ModelKey,
    Piece,
    SamplingOptions,
    Sequence,
    SequenceEvent,
)

VOCAB = 50
MAX_ROWS = 3
# Less than the rows below could take together, more than any takes alone.
MAX_CACHE_TOKENS = 40
PLENTY = 10**9
KEYS: list[ModelKey] = [("base", None), ("base", "d1"), ("base", "d2")]


def next_token(key: ModelKey, history: list[int]) -> int:
    return (sum((i + 1) * token for i, token in enumerate(history)) + 7 * KEYS.index(key)) % VOCAB


def expected_answer(key: ModelKey, prompt: list[int], num_tokens: int) -> list[int]:
    history = list(prompt)
    for _ in range(num_tokens):
        history.append(next_token(key, history))
    return history[len(prompt) :]


class _Words:
    def push(self, token_id: int) -> str:
        return f"{token_id} "

    def flush(self) -> str:
        return ""


class FakeRunner:
    """Holds each row's history; its logits point at the next token of that history."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, ModelKey, int]] = []
        self.broken: set[ModelKey] = set()

    def prefill(self, sequences: list[Sequence]) -> tuple[Any, torch.Tensor]:
        key = sequences[0].key
        assert all(sequence.key == key for sequence in sequences)
        self.calls.append(("prefill", key, len(sequences)))
        if key in self.broken:
            raise ArtifactCorruptError("The artifact can't be loaded.")
        batch = [(key, list(sequence.prompt_ids)) for sequence in sequences]
        return batch, self._logits(batch)

    def step(self, batch: Any, token_ids: list[int]) -> torch.Tensor:
        assert len(token_ids) == len(batch)
        self.calls.append(("step", batch[0][0], len(batch)))
        if batch[0][0] in self.broken:
            raise RuntimeError("The device is gone.")
        for (_, history), token_id in zip(batch, token_ids, strict=True):
            history.append(token_id)
        return self._logits(batch)

    def keep(self, batch: Any, rows: list[int]) -> None:
        batch[:] = [batch[row] for row in rows]

    def merge(self, batch: Any, other: Any) -> None:
        batch.extend(other)

    def num_cells(self, batch: Any) -> int:
        """Return the tokens that a real cache of these rows would hold, padding included."""
        return len(batch) * max(len(history) for _, history in batch)

    def _logits(self, batch: Any) -> torch.Tensor:
        return torch.nn.functional.one_hot(
            torch.tensor([next_token(key, history) for key, history in batch]), VOCAB
        ).float()


@dataclass
class Asked:
    sequence: Sequence
    events: list[SequenceEvent] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        text = "".join(event.text for event in self.events if isinstance(event, Piece))
        return [int(word) for word in text.split()]


def ask(key: ModelKey, prompt: list[int], max_tokens: int) -> Asked:
    events: list[SequenceEvent] = []
    sequence = Sequence(
        key=key,
        served=None,
        prompt_ids=prompt,
        options=SamplingOptions(max_tokens=max_tokens, temperature=0.0),
        decoder=_Words(),
        stop_token_ids=frozenset(),
        emit=events.append,
    )
    return Asked(sequence, events)


REQUESTS = st.lists(
    st.tuples(
        st.sampled_from(KEYS),
        st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=5),
        st.integers(1, 12),
        st.integers(0, 20),
        st.one_of(st.none(), st.integers(0, 25)),
    ),
    max_size=14,
)


@settings(max_examples=200, deadline=None)
@given(requests=REQUESTS)
def test_every_answer_is_its_own_whatever_comes_leaves_or_runs_beside_it(requests: list[Any]) -> None:
    runner = FakeRunner()
    core = EngineCore(runner, max_batch_rows=MAX_ROWS, max_cache_tokens=MAX_CACHE_TOKENS)
    asked = [ask(key, prompt, max_tokens) for key, prompt, max_tokens, _, _ in requests]
    tokens_when_cancelled: dict[int, int] = {}
    turn = 0
    while turn <= 25 or core.scheduler.has_work:
        for i, (_, _, _, arrival, leave) in enumerate(requests):
            if arrival == turn:
                core.scheduler.add(asked[i].sequence)
            if leave == turn and not asked[i].sequence.is_finished:
                asked[i].sequence.cancel()
                tokens_when_cancelled[i] = asked[i].sequence.num_completion_tokens
        core.step()
        assert core.scheduler.num_live_rows <= MAX_LIVE_BATCHES * MAX_ROWS
        assert core.scheduler.num_reserved_tokens <= MAX_CACHE_TOKENS
        assert sum(runner.num_cells(group.batch) for group in core.scheduler._groups) <= MAX_CACHE_TOKENS
        turn += 1
        assert turn < 1000, "the engine never comes to rest"
    assert all(rows <= MAX_ROWS for _, _, rows in runner.calls)
    for i, (key, prompt, max_tokens, _, _) in enumerate(requests):
        answer = expected_answer(key, prompt, max_tokens)
        if i in tokens_when_cancelled:
            assert asked[i].sequence.num_completion_tokens == tokens_when_cancelled[i]
            assert asked[i].tokens == answer[: len(asked[i].tokens)]
        else:
            assert asked[i].tokens == answer
            assert asked[i].events[-1] == Finish("length", max_tokens)


def test_a_new_arrival_is_answered_while_another_models_long_answer_runs() -> None:
    core = EngineCore(FakeRunner(), max_batch_rows=MAX_ROWS, max_cache_tokens=PLENTY)
    long, short = ask(KEYS[0], [1], 1000), ask(KEYS[1], [2], 2)
    core.scheduler.add(long.sequence)
    for _ in range(10):
        core.step()
    core.scheduler.add(short.sequence)
    for _ in range(4):
        core.step()
    assert short.sequence.is_finished
    assert not long.sequence.is_finished


def test_live_groups_take_steps_in_turn() -> None:
    runner = FakeRunner()
    core = EngineCore(runner, max_batch_rows=MAX_ROWS, max_cache_tokens=PLENTY)
    for key in KEYS:
        core.scheduler.add(ask(key, [1], 50).sequence)
    for _ in range(30):
        core.step()
    steps = [key for kind, key, _ in runner.calls if kind == "step"]
    last_nine = steps[-9:]
    assert last_nine[:3] == last_nine[3:6] == last_nine[6:9]
    assert set(last_nine) == set(KEYS)


def test_running_groups_step_between_the_prefills_of_a_queue() -> None:
    runner = FakeRunner()
    core = EngineCore(runner, max_batch_rows=1, max_cache_tokens=PLENTY)
    for i in range(5):
        core.scheduler.add(ask(KEYS[i % 3], [i], 50).sequence)
    for _ in range(11):
        core.step()
    # Before each further prefill every group that was live at the last one takes a step.
    assert "".join(kind[0] for kind, _, _ in runner.calls) == "pp" + "sp" + "ssp" + "sssp"


def test_rows_of_one_model_join_its_running_group() -> None:
    runner = FakeRunner()
    core = EngineCore(runner, max_batch_rows=MAX_ROWS, max_cache_tokens=PLENTY)
    first, second = ask(KEYS[0], [1], 50), ask(KEYS[0], [2, 3], 50)
    core.scheduler.add(first.sequence)
    core.step()
    core.scheduler.add(second.sequence)
    for _ in range(4):
        core.step()
    assert runner.calls[-1] == ("step", KEYS[0], 2)


def test_a_request_waits_until_the_caches_have_room_for_its_whole_answer_and_none_overtakes_it() -> None:
    core = EngineCore(FakeRunner(), max_batch_rows=MAX_ROWS, max_cache_tokens=20)
    first, long, short = ask(KEYS[0], [1], 5), ask(KEYS[1], [2] * 6, 12), ask(KEYS[0], [3], 1)
    core.scheduler.add(first.sequence)
    core.step()
    core.scheduler.add(long.sequence)
    core.scheduler.add(short.sequence)
    while not first.sequence.is_finished:
        assert core.step()
        assert long.events == [] and short.events == []
    core.step()
    assert [group.key for group in core.scheduler.groups] == [KEYS[1]]
    while core.step():
        pass
    assert long.tokens == expected_answer(KEYS[1], [2] * 6, 12)
    assert short.sequence.is_finished


def test_rows_that_would_pad_each_other_beyond_the_budget_stay_apart() -> None:
    runner = FakeRunner()
    core = EngineCore(runner, max_batch_rows=MAX_ROWS, max_cache_tokens=30)
    long, short = ask(KEYS[0], [1], 19), ask(KEYS[0], [2], 4)
    core.scheduler.add(long.sequence)
    core.step()
    core.scheduler.add(short.sequence)
    core.step()
    core.step()
    assert core.scheduler.num_live_rows == 2
    assert core.scheduler.num_reserved_tokens == 25


def test_a_fault_ends_the_answers_of_its_group_alone() -> None:
    runner = FakeRunner()
    core = EngineCore(runner, max_batch_rows=MAX_ROWS, max_cache_tokens=PLENTY)
    healthy, broken, refused = ask(KEYS[0], [1], 8), ask(KEYS[1], [2], 8), ask(KEYS[2], [3], 8)
    runner.broken.add(KEYS[2])
    for asked in (healthy, broken, refused):
        core.scheduler.add(asked.sequence)
    for _ in range(6):
        core.step()
    runner.broken.add(KEYS[1])
    while core.step():
        pass
    assert healthy.tokens == expected_answer(KEYS[0], [1], 8)
    assert isinstance(broken.events[-1], Failure)
    assert "device" not in broken.events[-1].error.message
    assert isinstance(refused.events[-1], Failure)
    assert isinstance(refused.events[-1].error, ArtifactCorruptError)


def test_a_cancelled_request_that_waits_is_never_run() -> None:
    runner = FakeRunner()
    core = EngineCore(runner, max_batch_rows=MAX_ROWS, max_cache_tokens=PLENTY)
    asked = ask(KEYS[0], [1], 8)
    core.scheduler.add(asked.sequence)
    asked.sequence.cancel()
    assert not core.step()
    assert runner.calls == []


def test_more_requests_than_may_wait_are_refused_and_can_come_again() -> None:
    engine = Engine(EngineCore(FakeRunner(), max_batch_rows=MAX_ROWS, max_cache_tokens=PLENTY), max_waiting=2)
    engine._thread.is_alive = lambda: True  # type: ignore[method-assign]  # nobody takes from the queue
    engine.submit([ask(KEYS[0], [1], 2).sequence])
    engine.submit([ask(KEYS[0], [1], 2).sequence])
    with pytest.raises(TooManyRequestsError) as caught:
        engine.submit([ask(KEYS[0], [1], 2).sequence])
    assert caught.value.retryable and caught.value.http_status == 429


def test_a_closed_engine_fails_what_runs_and_refuses_the_rest() -> None:
    engine = Engine(EngineCore(FakeRunner(), max_batch_rows=MAX_ROWS, max_cache_tokens=PLENTY), max_waiting=2)
    endless = ask(KEYS[0], [1], 10**9)
    engine.start()
    engine.submit([endless.sequence])
    engine.close()
    engine.join(timeout_seconds=10)
    assert not engine.is_alive
    assert isinstance(endless.events[-1], Failure)
    with pytest.raises(UnavailableError):
        engine.submit([ask(KEYS[0], [1], 2).sequence])
    with pytest.raises(UnavailableError):
        engine.call(list)


def test_a_closed_engine_fails_what_it_never_came_to() -> None:
    engine = Engine(EngineCore(FakeRunner(), max_batch_rows=MAX_ROWS, max_cache_tokens=PLENTY), max_waiting=9)
    started, gate = threading.Event(), threading.Event()
    engine.start()
    engine.call(lambda: (started.set(), gate.wait(30)))
    assert started.wait(30)
    engine.close()
    # Close let these in just before it was seen.
    engine._is_closed = False
    late, call = ask(KEYS[0], [1], 2), engine.call(list)
    engine.submit([late.sequence])
    engine._is_closed = True
    gate.set()
    engine.join(timeout_seconds=10)
    assert isinstance(late.events[-1], Failure)
    assert isinstance(call.exception(timeout=10), UnavailableError)


def test_work_between_steps_is_done_in_order_and_its_fault_is_its_callers() -> None:
    runner = FakeRunner()
    engine = Engine(EngineCore(runner, max_batch_rows=MAX_ROWS, max_cache_tokens=PLENTY), max_waiting=9)
    asked = ask(KEYS[0], [1], 3)
    order: list[str] = []

    def fail() -> None:
        order.append("third")
        raise RuntimeError("The device is gone.")

    first = engine_call_before_start(engine, lambda: order.append("first"))
    engine._inbox.put(asked.sequence)
    second = engine_call_before_start(engine, lambda: order.append("second"))
    third = engine_call_before_start(engine, fail)
    engine.start()
    assert (first.result(10), second.result(10)) == (None, None)
    assert isinstance(third.exception(10), RuntimeError)
    assert order == ["first", "second", "third"]
    assert engine.call(lambda: 7).result(10) == 7
    engine.close()
    engine.join(timeout_seconds=10)


def engine_call_before_start(engine: Engine, work: Callable[[], Any]) -> Future[Any]:
    call = _Call(work)
    engine._inbox.put(call)
    return call.future


def test_a_sweep_lets_go_of_rows_that_nobody_waits_for_and_of_no_others() -> None:
    core = EngineCore(FakeRunner(), max_batch_rows=MAX_ROWS, max_cache_tokens=PLENTY)
    left, stays = ask(KEYS[0], [1], 50), ask(KEYS[1], [2], 50)
    for asked in (left, stays):
        core.scheduler.add(asked.sequence)
    for _ in range(4):
        core.step()
    left.sequence.cancel()
    core.sweep()
    assert [group.key for group in core.scheduler.groups] == [KEYS[1]]
    while core.step():
        pass
    assert stays.tokens == expected_answer(KEYS[1], [2], 50)


def test_the_text_of_a_fault_is_not_logged_for_it_may_quote_a_prompt(
    caplog: pytest.LogCaptureFixture,
) -> None:
    runner = FakeRunner()
    core = EngineCore(runner, max_batch_rows=MAX_ROWS, max_cache_tokens=PLENTY)
    asked = ask(KEYS[0], [1], 8)
    core.scheduler.add(asked.sequence)
    core.step()
    runner.broken.add(KEYS[0])
    core.step()
    assert isinstance(asked.events[-1], Failure)
    assert "RuntimeError" in caplog.text and "in step" in caplog.text
    assert "device is gone" not in caplog.text.replace('raise RuntimeError("The device is gone.")', "")


def test_virtual_tokens_count_for_the_memory_of_every_row() -> None:
    core = EngineCore(FakeRunner(), max_batch_rows=MAX_ROWS, max_cache_tokens=40)
    asked = [ask(KEYS[0], [1], 5) for _ in range(3)]
    for item in asked:
        item.sequence.num_virtual_tokens = 10
        core.scheduler.add(item.sequence)
    core.step()
    # 10 + 1 + 5 tokens a row: two rows fit 40, three don't.
    assert core.scheduler.num_live_rows == 2
    assert core.scheduler.num_reserved_tokens == 32
    while core.step():
        pass
    assert all(item.tokens == expected_answer(KEYS[0], [1], 5) for item in asked)
