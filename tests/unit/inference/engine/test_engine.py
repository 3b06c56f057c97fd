"""The engine over runners whose every token is known beforehand."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.errors import ArtifactCorruptError, TooManyRequestsError, UnavailableError
from luthier.inference.engine import engine as engine_module
from luthier.inference.engine.engine import Engine, _Call
from luthier.inference.engine.sequence import Failure, Finish
from luthier.inference.engine.step import BatchExecutor
from luthier.modeling.protocols import AdapterInfo, ScheduledBatch
from tests.table_runner import VOCAB, TableLogits, TableRunner, expected_answer
from tests.unit.inference import sequences
from tests.unit.inference.sequences import Asked

ADAPTERS = (None, 1, 2)


def ask(
    executor: BatchExecutor, prompt: list[int], max_tokens: int, adapter: int | None = None, **given: str
) -> Asked:
    info = None if adapter is None else AdapterInfo(adapter, 0, 1)
    return sequences.ask(prompt, max_tokens, executor=executor, adapter=info, **given)


def run(engine: Engine, *asked: Asked, num_steps: int = 10**6) -> None:
    """Add sequences and step, until nothing is left to do or `num_steps` times."""
    for one in asked:
        engine.add(one.sequence)
    for _ in range(num_steps):
        if not engine.step():
            break


def make_executor(**limits: Any) -> BatchExecutor:
    return BatchExecutor(TableRunner(**limits))


def runner_of(executor: BatchExecutor) -> TableRunner:
    assert isinstance(executor.runner, TableRunner)
    return executor.runner


@contextmanager
def running(engine: Any) -> Iterator[Any]:
    engine.start()
    yield engine
    engine.close()
    engine.join(timeout_seconds=10)
    assert not engine.is_alive


REQUESTS = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.sampled_from(ADAPTERS),
        st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9),
        st.integers(1, 12),
        st.integers(0, 20),
        st.one_of(st.none(), st.integers(0, 25)),
    ),
    max_size=14,
)


@settings(max_examples=200, deadline=None)
@given(requests=REQUESTS, mixes=st.booleans())
def test_every_answer_is_its_own_whatever_comes_leaves_or_runs_beside_it(requests, mixes):
    # Few blocks, so that sequences are preempted.
    limits = {"num_blocks": 9, "max_sequences": 3, "short_prompt_tokens": 4, "max_prefill_tokens": 6}
    executors = [make_executor(**limits, mixes_adapters=mixes) for _ in range(2)]
    engine = Engine(max_waiting=99)
    asked = [
        ask(executors[number], prompt, max_tokens, adapter=adapter)
        for number, adapter, prompt, max_tokens, _, _ in requests
    ]
    tokens_when_cancelled: dict[int, int] = {}
    turn = 0
    while turn <= 25 or engine.has_work:
        for i, (*_, arrival, leave) in enumerate(requests):
            if arrival == turn:
                engine.add(asked[i].sequence)
            if leave == turn and not asked[i].sequence.is_finished:
                asked[i].sequence.cancel()
                tokens_when_cancelled[i] = asked[i].sequence.num_completion_tokens
        engine.step()
        turn += 1
        assert turn < 1000, "the engine never comes to rest"
    for i, (_, adapter, prompt, max_tokens, _, _) in enumerate(requests):
        answer = expected_answer(adapter, prompt, max_tokens)
        if i in tokens_when_cancelled:
            assert asked[i].sequence.num_completion_tokens == tokens_when_cancelled[i]
            assert asked[i].token_ids == answer[: len(asked[i].token_ids)]
        else:
            assert asked[i].token_ids == answer
            assert asked[i].events[-1] == Finish("length", max_tokens)
    for executor in executors:
        assert executor.scheduler.pool.num_free == executor.scheduler.pool.num_blocks


def test_a_preempted_sequence_ends_with_the_same_answer():
    executor, engine = make_executor(num_blocks=6), Engine(max_waiting=9)
    asked = [ask(executor, [seed, 3, 4], 12) for seed in range(3)]
    run(engine, *asked)
    assert engine.measures.num_preempted > 0
    assert [one.token_ids for one in asked] == [expected_answer(None, [seed, 3, 4], 12) for seed in range(3)]


def test_the_engine_alternates_between_runners():
    engine, executors = Engine(max_waiting=9), [make_executor(), make_executor()]
    asked = [ask(executor, [1], 20) for executor in executors]
    run(engine, *asked, num_steps=5)
    assert [len(runner_of(executor).batches) for executor in executors] == [5, 5]


def test_a_new_arrival_is_answered_while_another_models_long_answer_runs():
    executor, engine = make_executor(mixes_adapters=False, num_blocks=999), Engine(max_waiting=9)
    long, short = ask(executor, [1], 1000), ask(executor, [2], 2, adapter=1)
    run(engine, long, num_steps=10)
    run(engine, short, num_steps=4)
    assert short.sequence.is_finished
    assert not long.sequence.is_finished


def test_a_project_that_fills_the_queue_delays_another_by_one_turn():
    executor, engine = make_executor(max_sequences=1), Engine(max_waiting=99)
    crowd = [ask(executor, [i], 1, project_id="crowd") for i in range(20)]
    single = ask(executor, [7], 1, project_id="single")
    run(engine, *crowd, single, num_steps=2)
    assert single.sequence.is_finished
    assert sum(one.sequence.is_finished for one in crowd) == 1


def test_a_request_waits_until_there_are_blocks_for_its_prompt_and_none_overtakes_it():
    executor, engine = make_executor(num_blocks=5), Engine(max_waiting=9)
    first, long, short = ask(executor, [1], 7), ask(executor, [2] * 13, 3), ask(executor, [3], 1)
    for one in (first, long, short):
        engine.add(one.sequence)
    while not first.sequence.is_finished:
        assert engine.step()
        assert long.events == [] and short.events == []
    run(engine)
    assert long.token_ids == expected_answer(None, [2] * 13, 3)
    assert short.sequence.is_finished


@pytest.mark.parametrize("are_on_one_runner", [True, False])
def test_a_fault_of_one_sequence_ends_that_sequence_alone(are_on_one_runner):
    engine, executors = Engine(max_waiting=9), [make_executor(), make_executor()]
    healthy = ask(executors[0], [1], 8)
    broken = ask(executors[0 if are_on_one_runner else 1], [2], 8, adapter=1)
    run(engine, healthy, broken, num_steps=3)
    for executor in executors:
        runner_of(executor).broken.add(1)
    run(engine)
    assert healthy.token_ids == expected_answer(None, [1], 8)
    assert isinstance(broken.events[-1], Failure)
    assert "device" not in broken.events[-1].error.message


class _BrokenExecutor(BatchExecutor):
    """Has answers to make and fails at them."""

    def step(self) -> bool:
        raise ArtifactCorruptError("The block is gone.")


def test_a_fault_of_a_scheduler_ends_the_answers_of_its_runner_alone():
    engine = Engine(max_waiting=9)
    broken, sound = ask(_BrokenExecutor(TableRunner()), [3], 4), ask(make_executor(), [5, 6], 4)
    run(engine, broken, sound)
    assert isinstance(broken.events[-1], Failure)
    assert isinstance(broken.events[-1].error, ArtifactCorruptError)
    assert sound.token_ids == expected_answer(None, [5, 6], 4)


class _NotFinite(TableRunner):
    """Marks the logits of one adapter as not finite."""

    def execute(self, batch: ScheduledBatch, on_launch: Callable[[], None] | None = None) -> TableLogits:
        logits, row = super().execute(batch, on_launch), 0
        for chunk in batch.chunks:
            if chunk.num_logit_rows and chunk.adapter == 1:
                logits._tokens[row] = -1
            row += chunk.num_logit_rows
        return logits


def test_logits_that_are_not_finite_end_their_sequence_alone():
    executor, engine = BatchExecutor(_NotFinite()), Engine(max_waiting=9)
    sound, broken = ask(executor, [1], 8), ask(executor, [2], 8, adapter=1)
    run(engine, sound, broken)
    assert sound.token_ids == expected_answer(None, [1], 8)
    assert isinstance(broken.events[-1], Failure) and "not finite" in broken.events[-1].error.message


def test_a_cancelled_request_that_waits_is_never_run():
    executor, engine = make_executor(), Engine(max_waiting=9)
    asked = ask(executor, [1], 8)
    engine.add(asked.sequence)
    asked.sequence.cancel()
    assert not engine.step()
    assert runner_of(executor).batches == []


def test_more_requests_than_may_wait_are_refused_and_can_come_again():
    executor, engine = make_executor(), Engine(max_waiting=2)
    engine._thread.is_alive = lambda: True  # type: ignore[method-assign]  # no thread takes from the queue
    engine.submit([ask(executor, [1], 2).sequence])
    engine.submit([ask(executor, [1], 2).sequence])
    with pytest.raises(TooManyRequestsError) as caught:
        engine.submit([ask(executor, [1], 2).sequence])
    assert caught.value.retryable and caught.value.http_status == 429


def test_a_closed_engine_fails_what_runs_and_refuses_the_rest():
    executor, engine = make_executor(num_blocks=10**5), Engine(max_waiting=2)
    endless = ask(executor, [1], 10**9)
    with running(engine):
        engine.submit([endless.sequence])
    assert isinstance(endless.events[-1], Failure)
    with pytest.raises(UnavailableError):
        engine.submit([ask(executor, [1], 2).sequence])
    with pytest.raises(UnavailableError):
        engine.call(list)


def test_a_closed_engine_fails_what_it_never_came_to():
    executor, engine = make_executor(), Engine(max_waiting=9)
    started, gate = threading.Event(), threading.Event()
    with running(engine):
        engine.call(lambda: (started.set(), gate.wait(30)))
        assert started.wait(30)
        engine.close()
        # Submitted just before the engine was closed.
        engine._is_closed = False
        late, call = ask(executor, [1], 2), engine.call(list)
        engine.submit([late.sequence])
        engine._is_closed = True
        gate.set()
    assert isinstance(late.events[-1], Failure)
    assert isinstance(call.exception(timeout=10), UnavailableError)


def call_before_start(engine: Engine, work: Callable[[], Any]) -> Future[Any]:
    call = _Call(work)
    engine._inbox.put(call)
    return call.future


def test_work_between_steps_is_done_in_order_and_its_fault_is_its_callers():
    engine = Engine(max_waiting=9)
    asked = ask(make_executor(), [1], 3)
    order: list[str] = []

    def fail() -> None:
        order.append("third")
        raise RuntimeError("The device is gone.")

    first = call_before_start(engine, lambda: order.append("first"))
    engine._inbox.put(asked.sequence)
    second = call_before_start(engine, lambda: order.append("second"))
    third = call_before_start(engine, fail)
    with running(engine):
        assert (first.result(10), second.result(10)) == (None, None)
        assert isinstance(third.exception(10), RuntimeError)
        assert order == ["first", "second", "third"]
        assert engine.call(lambda: 7).result(10) == 7


def test_a_sweep_frees_the_blocks_of_cancelled_sequences_and_of_no_others():
    executor, engine = make_executor(), Engine(max_waiting=9)
    left, stays = ask(executor, [1], 50), ask(executor, [2], 30)
    run(engine, left, stays, num_steps=4)
    left.sequence.cancel()
    with running(engine):
        engine.sweep().result(30)
        assert not any(one.sequence is left.sequence for one in executor.scheduler.running)
        while not stays.sequence.is_finished:
            engine.call(list).result(30)
    assert stays.token_ids == expected_answer(None, [2], 30)


def test_the_text_of_a_fault_is_not_logged_for_it_may_quote_a_prompt(caplog):
    executor, engine = make_executor(), Engine(max_waiting=9)
    asked = ask(executor, [1], 8)
    run(engine, asked, num_steps=1)
    runner_of(executor).broken.add(None)
    engine.step()
    assert isinstance(asked.events[-1], Failure)
    assert "RuntimeError" in caplog.text and "in execute" in caplog.text
    assert "device is gone" not in caplog.text.replace('raise RuntimeError("The device is gone.")', "")


def test_events_are_flushed_before_each_batch(monkeypatch):
    executor, engine = make_executor(), Engine(max_waiting=9)
    flushes: list[int] = []
    monkeypatch.setattr(engine.events, "flush", lambda: flushes.append(len(runner_of(executor).batches)))
    run(engine, ask(executor, [5, 6], 3))
    assert flushes == [0, 1, 2]


class _Gathering(Engine):
    """Notes how many requests had come by its first step."""

    def __init__(self) -> None:
        super().__init__(max_waiting=9)
        self.has_stepped = threading.Event()
        self.num_first = 0
        self.executor = make_executor()

    def step(self) -> bool:
        if not self.has_stepped.is_set():
            self.num_first = self.num_waiting
            self.has_stepped.set()
        return super().step()

    def submit_one(self) -> None:
        self.submit([ask(self.executor, [1], 2).sequence])


@pytest.fixture
def gathering() -> Iterator[_Gathering]:
    with running(_Gathering()) as engine:
        yield engine


@pytest.mark.parametrize("are_expected", [True, False])
def test_an_expected_request_runs_with_the_first(are_expected, gathering, monkeypatch):
    # Long enough for any machine: an engine that expects none waits for a moment of quiet alone.
    monkeypatch.setattr(engine_module, "_GATHER_SECONDS", 3600.0)
    if are_expected:
        with gathering.expecting():
            gathering.submit_one()
            assert not gathering.has_stepped.wait(0.05)
            gathering.submit_one()
    else:
        gathering.submit_one()
    assert gathering.has_stepped.wait(30)
    assert gathering.num_first == (2 if are_expected else 1)


def test_an_idle_engine_waits_for_a_moment_at_most(gathering):
    with gathering.expecting():
        gathering.submit_one()
        assert gathering.has_stepped.wait(30)
    assert gathering.num_first == 1


def test_a_request_that_follows_at_once_runs_with_the_first(gathering, monkeypatch):
    monkeypatch.setattr(engine_module, "_GATHER_SECONDS", 2.0)
    monkeypatch.setattr(engine_module, "_QUIET_SECONDS", 0.5)
    for _ in range(3):
        gathering.submit_one()
        assert not gathering.has_stepped.wait(0.01)
    assert gathering.has_stepped.wait(30)
    assert gathering.num_first == 3
