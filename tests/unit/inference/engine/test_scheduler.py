"""Sequences of any mix of methods in one batch answer as each method does alone, whatever comes and goes."""

import random
from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from luthier.core.errors import OutOfMemoryError
from luthier.core.shapes import read_shape
from luthier.inference.engine.block_pool import BlockPool, BlockTable
from luthier.inference.engine.sequence import Failure, Finish
from luthier.inference.engine.step import BatchExecutor
from luthier.inference.verification.checks import verify_adapter
from luthier.methods import discover, method_of_artifact
from luthier.modeling.protocols import AdapterInfo, AdapterSource
from tests.unit.inference import sequences
from tests.unit.inference.artifacts import (
    all_tunings,
    build_method_artifact,
    greedy,
    load_plain,
    method_greedy,
    pack,
    tuning_name,
)
from tests.unit.inference.sequences import Asked, run

NUM_MIXES = 300
NUM_TOKENS = 20
PROBE_IDS = [5, 6, 7]
_BEGINNING = [(11 * number) % 40 + 3 for number in range(40)]
PROMPTS = [
    [9],
    [5, 6, 7, 8, 9, 10, 11],
    [*_BEGINNING[:33], 8],
    [*_BEGINNING, 12, 13],
    [(7 * number) % 250 + 3 for number in range(150)],
]
TUNINGS = [tuning for tuning in all_tunings() if not discover()[tuning["type"]].is_whole_model]


@dataclass
class Model:
    """An adapter, and what its method answers to each prompt."""

    adapter: AdapterInfo | None
    source: AdapterSource | None
    expected: list[list[int]]


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
    found = [Model(None, None, [greedy(plain, prompt, NUM_TOKENS) for prompt in PROMPTS])]
    for seed, tuning in enumerate(TUNINGS):
        artifact = build_method_artifact(folder / tuning_name(tuning), base_folder, tuning, seed=seed)
        parts = method_of_artifact(artifact.folder).read_parts(artifact.folder, read_shape(base_folder))
        source = AdapterSource(artifact.folder, parts)
        adapter = executor.runner.add_adapter(source)
        answers = [method_greedy(base_folder, artifact.folder, prompt, NUM_TOKENS) for prompt in PROMPTS]
        found.append(Model(adapter, source, answers))
    # They differ at all, or equality with them says nothing.
    assert len({str(model.expected) for model in found}) == len(found)
    return found


def ask(model: Model, number: int, max_tokens: int = NUM_TOKENS) -> Asked:
    asked = sequences.ask(PROMPTS[number], max_tokens, adapter=model.adapter, stop_token_ids=[2])
    answer = model.expected[number]
    asked.expected = answer[: answer.index(2)] if 2 in answer else answer
    return asked


def test_300_random_mixes_answer_token_by_token_as_each_method_does_alone(base_folder, models, monkeypatch):
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
        run(executor)
        for asked in mix:
            assert asked.token_ids == asked.expected, seed
            assert isinstance(asked.events[-1], Finish)
    # Sequences were preempted and blocks shared, or the equality above says less than it seems.
    assert sum(executor.measures.num_preempted for executor in executors) > 10
    assert sum(count > 0 for count in num_shared) > 100
    num_right = sum(executor.measures.num_right_drafts for executor in executors)
    assert 100 < num_right < sum(executor.measures.num_drafts for executor in executors) - 100
    # Nothing is lost: all blocks are free again.
    assert all(
        executor.scheduler.pool.num_free == executor.scheduler.pool.num_blocks for executor in executors
    )


def test_a_long_prompt_runs_in_chunks_while_others_answer_and_short_ones_go_before_it(base_folder, models):
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
    run(executor)
    for asked in (running, long, short):
        assert asked.token_ids == asked.expected


def test_a_long_prompt_is_not_passed_over_for_ever(base_folder, models):
    executor = make_executor(base_folder, models, max_rows=4)
    long = ask(models[0], 4)
    executor.scheduler.add(long.sequence)
    for _ in range(60):
        executor.scheduler.add(ask(models[1], 1, max_tokens=1).sequence)
        executor.step()
    assert long.sequence.num_completion_tokens > 0


def test_an_answer_larger_than_all_blocks_fails_with_the_setting_and_others_continue(base_folder, models):
    executor = make_executor(base_folder, models, max_cache_tokens=64)
    large, small = ask(models[0], 4), ask(models[0], 1)
    run(executor, large, small)
    failure = large.events[-1]
    assert isinstance(failure, Failure) and isinstance(failure.error, OutOfMemoryError)
    assert "LUTHIER_MAX_CACHE_TOKENS" in failure.error.message
    assert small.token_ids == small.expected


def test_verification_takes_blocks_from_running_answers_which_stay_what_they_were(base_folder, models):
    # The longest prompt, its answer and virtual tokens take nearly all of the blocks.
    executor = make_executor(base_folder, models, max_cache_tokens=192)
    for model in models[1:]:
        running = ask(models[0], 4)
        executor.scheduler.add(running.sequence)
        for _ in range(4):
            executor.step()
        verify_adapter(executor, model.adapter, PROBE_IDS, None)
        run(executor)
        assert running.token_ids == running.expected
    assert executor.measures.num_preempted > 0
    assert executor.scheduler.pool.num_free == executor.scheduler.pool.num_blocks
