"""Sequences of any mix of methods in one batch answer as each method does alone, whatever comes and goes."""

import random
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.core.errors import OutOfMemoryError
from luthier.core.shapes import read_shape
from luthier.inference.engine.block_pool import BlockPool, BlockTable
from luthier.inference.engine.scheduler import max_long_chunk
from luthier.inference.engine.sequence import (
    Failure,
    Finish,
    ModelKey,
    SamplingOptions,
    Sequence,
    SequenceEvent,
)
from luthier.inference.engine.step import BatchExecutor
from luthier.inference.verification.checks import verify_adapter
from luthier.methods import discover, method_of_artifact
from luthier.modeling.protocols import AdapterInfo, AdapterSource, RunnerLimits
from luthier_cpu.decode.batch import Chunk
from luthier_cpu.decode.sampling import Logits
from tests.tiny import BASE_ID, build_tiny_base
from tests.unit.inference.artifacts import (
    all_tunings,
    build_method_artifact,
    greedy,
    load_plain,
    method_greedy,
    pack,
    tuning_name,
)

NUM_MIXES = 300
NUM_TOKENS = 20
PROBE_IDS = [5, 6, 7]
LIMITS = RunnerLimits("float32", 300, 512, 16, 32, 1, 8, 256, 512)
LONG, SHORT = LIMITS.long_chunk_tokens, LIMITS.short_prompt_tokens
_BEGINNING = [(11 * number) % 40 + 3 for number in range(40)]
PROMPTS = [
    [9],
    [5, 6, 7, 8, 9, 10, 11],
    [*_BEGINNING[:33], 8],
    [*_BEGINNING, 12, 13],
    [(7 * number) % 250 + 3 for number in range(150)],
]
TUNINGS = [tuning for tuning in all_tunings() if not discover()[tuning["type"]].is_whole_model]


class Ids:
    """A decoder that keeps tokens as characters, so that nothing is lost in text."""

    def push(self, token_id: int) -> str:
        return chr(0x4E00 + token_id)

    def flush(self) -> str:
        return ""


@dataclass
class Model:
    """What answers: its key and adapter, and what its method says to each prompt."""

    key: ModelKey
    adapter: AdapterInfo | None
    source: AdapterSource | None
    expected: list[list[int]]


@dataclass
class Asked:
    """A request and what came of it."""

    sequence: Sequence
    expected: list[int]
    events: list[SequenceEvent]

    @property
    def token_ids(self) -> list[int]:
        texts = (getattr(event, "text", "") for event in self.events)
        return [ord(character) - 0x4E00 for text in texts for character in text]


@dataclass(frozen=True)
class ServedStub:
    """The part of a ready model that the scheduler reads."""

    adapter: AdapterInfo | None


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return build_tiny_base(tmp_path_factory.mktemp("bases") / BASE_ID)


def make_executor(
    base_folder: Path,
    models: Sequence_[Model] = (),
    *,
    max_rows: int = 8,
    max_cache_tokens: int = 2048,
    max_draft_tokens: int = 0,
) -> BatchExecutor:
    """Make an executor with all models' adapters, of the same ids whatever its limits."""
    limits = {"max_rows": max_rows, "max_cache_tokens": max_cache_tokens}
    model = load_plain(base_folder)
    executor = pack(model, base_folder, **limits, max_draft_tokens=max_draft_tokens)
    for one in models:
        if one.source is not None:
            assert executor.runner.add_adapter(one.source) == one.adapter
    return executor


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> list[Model]:
    folder, plain = tmp_path_factory.mktemp("artifacts"), load_plain(base_folder)
    executor = make_executor(base_folder)
    found = [Model((BASE_ID, None), None, None, [greedy(plain, prompt, NUM_TOKENS) for prompt in PROMPTS])]
    for seed, tuning in enumerate(TUNINGS):
        artifact = build_method_artifact(folder / tuning_name(tuning), base_folder, tuning, seed=seed)
        parts = method_of_artifact(artifact.folder).read_parts(artifact.folder, read_shape(base_folder))
        source = AdapterSource(artifact.folder, parts)
        adapter = executor.runner.add_adapter(source)
        answers = [method_greedy(base_folder, artifact.folder, prompt, NUM_TOKENS) for prompt in PROMPTS]
        found.append(Model((BASE_ID, artifact.digest), adapter, source, answers))
    # They differ at all, or equality with them says nothing.
    assert len({str(model.expected) for model in found}) == len(found)
    return found


def ask(model: Model, number: int, project: str = "p", max_tokens: int = NUM_TOKENS) -> Asked:
    events: list[SequenceEvent] = []
    sequence = Sequence(
        key=model.key,
        served=ServedStub(model.adapter),
        prompt_ids=PROMPTS[number],
        options=SamplingOptions(max_tokens=max_tokens, temperature=0.0),
        decoder=Ids(),
        stop_token_ids=frozenset({2}),
        emit=events.append,
        project_id=project,
    )
    answer = model.expected[number]
    return Asked(sequence, answer[: answer.index(2)] if 2 in answer else answer, events)


def run_dry(executor: BatchExecutor) -> None:
    for _ in range(2000):
        if not executor.scheduler.has_work:
            return
        executor.step()
    raise AssertionError("the executor never ends")


def test_300_random_mixes_answer_token_by_token_as_each_method_does_alone(
    base_folder: Path, models: list[Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    executors = [
        make_executor(base_folder, models, max_rows=rows, max_cache_tokens=tokens, max_draft_tokens=drafts)
        for rows, tokens, drafts in ((8, 2048, 0), (8, 2048, 7), (5, 240, 3), (3, 208, 7))
    ]
    assert all(model.adapter is None or model.adapter.num_bytes > 0 for model in models)
    num_shared: list[int] = []
    start = BlockPool.start

    def counted(pool: BlockPool, *args: Any, **options: Any) -> BlockTable:
        table = start(pool, *args, **options)
        num_shared.append(table.num_cached)
        return table

    monkeypatch.setattr(BlockPool, "start", counted)
    for seed in range(NUM_MIXES):
        dice = random.Random(seed)
        executor = executors[seed % len(executors)]
        mix = [ask(dice.choice(models), dice.randrange(len(PROMPTS))) for _ in range(dice.randint(2, 9))]
        for asked in mix:
            executor.scheduler.add(asked.sequence)
            for _ in range(dice.randint(0, 6)):
                executor.step()
        run_dry(executor)
        for asked in mix:
            assert asked.token_ids == asked.expected, (seed, asked.sequence.key)
            assert isinstance(asked.events[-1], Finish)
    # Rows were pushed out and pages shared, or the equality above says less than it seems.
    assert sum(executor.measures.num_preempted for executor in executors) > 10
    assert sum(count > 0 for count in num_shared) > 100
    num_right = sum(executor.measures.num_right_drafts for executor in executors)
    assert 100 < num_right < sum(executor.measures.num_drafts for executor in executors) - 100
    # Nothing is lost: all pages can be had again.
    assert all(
        executor.scheduler.pool.num_free == executor.scheduler.pool.num_blocks for executor in executors
    )


def test_a_cancelled_sequence_frees_its_blocks_before_the_next_step(
    base_folder: Path, models: list[Model]
) -> None:
    executor = make_executor(base_folder, models)
    leaving, staying = ask(models[0], 1), ask(models[1], 1)
    for asked in (leaving, staying):
        executor.scheduler.add(asked.sequence)
    executor.step()
    leaving.sequence.cancel()
    executor.step()
    assert len(executor.scheduler.running) == 1
    run_dry(executor)
    assert staying.token_ids == staying.expected


def test_a_long_prompt_runs_in_chunks_while_others_answer_and_short_ones_go_before_it(
    base_folder: Path, models: list[Model]
) -> None:
    executor = make_executor(base_folder, models)
    running, long, short = ask(models[0], 1), ask(models[0], 4), ask(models[2], 1)
    executor.scheduler.add(running.sequence)
    executor.step()
    executor.scheduler.add(long.sequence)
    executor.step()
    assert running.sequence.num_completion_tokens == 2 and long.sequence.num_completion_tokens == 0
    executor.scheduler.add(short.sequence)
    executor.step()
    assert short.sequence.num_completion_tokens == 1 and long.sequence.num_completion_tokens == 0
    run_dry(executor)
    for asked in (running, long, short):
        assert asked.token_ids == asked.expected
    assert len(PROMPTS[4]) > SHORT


@pytest.mark.parametrize(
    ("num_tokens", "chunk_sizes"),
    [
        (LONG + 1, [LONG + 1]),
        (SHORT, [SHORT]),
        (
            SHORT + 1,
            [LONG, SHORT + 1 - LONG],
        ),
        (
            LONG + SHORT,
            [LONG, SHORT],
        ),
    ],
)
def test_a_prompt_is_run_at_once_or_in_chunks_and_its_rest_at_once(
    base_folder: Path, models: list[Model], num_tokens: int, chunk_sizes: list[int]
) -> None:
    executor, seen = make_executor(base_folder, models), []
    step = executor.runner.model.step

    def see(work: list[Chunk], **options: Any) -> Logits:
        seen.extend(len(one) for one in work)
        return step(work, **options)

    executor.runner.model.step = see  # type: ignore[method-assign,assignment]
    asked = ask(models[0], 4, max_tokens=1)
    asked.sequence.prompt_ids = PROMPTS[4][:num_tokens]
    executor.scheduler.add(asked.sequence)
    run_dry(executor)
    assert seen == chunk_sizes


def test_a_long_prompt_is_not_passed_over_for_ever(base_folder: Path, models: list[Model]) -> None:
    executor = make_executor(base_folder, models, max_rows=4)
    long = ask(models[0], 4)
    executor.scheduler.add(long.sequence)
    for _ in range(60):
        executor.scheduler.add(ask(models[1], 1, max_tokens=1).sequence)
        executor.step()
    assert long.sequence.num_completion_tokens > 0


def test_a_projects_crowd_does_not_keep_another_projects_request_waiting(
    base_folder: Path, models: list[Model]
) -> None:
    executor = make_executor(base_folder, models, max_rows=2)
    crowd = [ask(models[0], 1, "crowd") for _ in range(6)]
    single = ask(models[1], 1, "single")
    for asked in (*crowd, single):
        executor.scheduler.add(asked.sequence)
    executor.step()
    assert single.sequence.num_completion_tokens == 1
    run_dry(executor)


def test_a_sequence_that_fails_in_a_step_fails_alone(
    base_folder: Path, models: list[Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    executor = make_executor(base_folder, models)
    bad, good = ask(models[1], 1), ask(models[2], 1)
    step = executor.runner.model.step

    def failing(chunks: Any, **how: Any) -> Any:
        assert models[1].adapter is not None
        descriptor = executor.runner._adapters[models[1].adapter.adapter].descriptor
        if any(one.adapter is descriptor for one in chunks):
            raise RuntimeError("the adapter is broken")
        return step(chunks, **how)

    monkeypatch.setattr(executor.runner.model, "step", failing)
    for asked in (bad, good):
        executor.scheduler.add(asked.sequence)
    run_dry(executor)
    assert good.token_ids == good.expected
    assert isinstance(bad.events[-1], Failure)


def test_a_sequence_whose_logits_are_not_finite_fails_alone(base_folder: Path, models: list[Model]) -> None:
    executor = make_executor(base_folder, models)
    bad, good = ask(models[1], 1), ask(models[2], 1)
    for asked in (bad, good):
        executor.scheduler.add(asked.sequence)
    executor.step()
    [row] = [row for row in executor.scheduler.running if row.sequence is bad.sequence]
    executor.runner.model.pages.values[:, row.table.blocks[0]] = torch.nan
    run_dry(executor)
    assert good.token_ids == good.expected
    assert isinstance(bad.events[-1], Failure)


def test_an_answer_larger_than_all_blocks_fails_with_the_setting_and_others_continue(
    base_folder: Path, models: list[Model]
) -> None:
    executor = make_executor(base_folder, models, max_cache_tokens=64)
    large, small = ask(models[0], 4), ask(models[0], 1)
    for asked in (large, small):
        executor.scheduler.add(asked.sequence)
    run_dry(executor)
    failure = large.events[-1]
    assert isinstance(failure, Failure) and isinstance(failure.error, OutOfMemoryError)
    assert "LUTHIER_MAX_CACHE_TOKENS" in failure.error.message
    assert small.token_ids == small.expected


def test_draining_returns_all_sequences_and_frees_all_blocks(base_folder: Path, models: list[Model]) -> None:
    executor = make_executor(base_folder, models, max_rows=1)
    asked = [ask(models[0], 1), ask(models[1], 1)]
    for one in asked:
        executor.scheduler.add(one.sequence)
    executor.step()
    assert set(executor.scheduler.drain()) == {one.sequence for one in asked}
    assert (
        not executor.scheduler.has_work
        and executor.scheduler.pool.num_free == executor.scheduler.pool.num_blocks
    )


def test_the_farther_a_long_prompt_has_come_the_fewer_of_its_tokens_run_at_once() -> None:
    counts = [max_long_chunk(LIMITS, num_done) for num_done in range(0, 9000, 100)]
    assert counts[0] == LONG and counts == sorted(counts, reverse=True)
    assert set(counts) == {16, 32}
    # 16 are what kernels take at a time; more are no more work than so many pairs.
    assert all(count == 16 or count * 100 * place <= 1 << 16 for place, count in enumerate(counts))


def test_verification_takes_blocks_from_running_answers_which_stay_what_they_were(
    base_folder: Path, models: list[Model]
) -> None:
    # The longest prompt, its answer and virtual tokens take nearly all of the pages.
    executor = make_executor(base_folder, models, max_cache_tokens=192)
    for model in models[1:]:
        running = ask(models[0], 4)
        executor.scheduler.add(running.sequence)
        for _ in range(4):
            executor.step()
        assert model.adapter is not None
        verify_adapter(executor, model.adapter, PROBE_IDS, None)
        run_dry(executor)
        assert running.token_ids == running.expected
    assert executor.measures.num_preempted > 0
    assert executor.scheduler.pool.num_free == executor.scheduler.pool.num_blocks
