"""Rows of any mix of methods in one lane answer as each method does alone, whatever comes and goes."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.core.errors import OutOfMemoryError
from luthier.core.shapes import read_shape
from luthier.inference.bases import pack
from luthier.inference.engine.block_pool import Chain, PagePool
from luthier.inference.engine.scheduler import Lane
from luthier.inference.engine.sequence import (
    Failure,
    Finish,
    ModelKey,
    SamplingOptions,
    Sequence,
    SequenceEvent,
)
from luthier.inference.engine.step import MAX_LONG_TOKENS, MAX_SHORT_TOKENS, most_of_long
from luthier.inference.verification import prepare, verify_adapter
from luthier.methods import discover, method_of_artifact
from luthier.modeling.logits import Logits
from luthier.modeling.packed_adapter import PackedAdapter, lay_out
from luthier.modeling.packed_work import Stretch
from tests.tiny import BASE_ID, build_tiny_base
from tests.unit.inference.artifacts import (
    all_tunings,
    build_method_artifact,
    greedy,
    load_plain,
    method_greedy,
    tuning_name,
)

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
    adapter: PackedAdapter | None
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
    """The part of a ready model that a lane looks at."""

    adapter: PackedAdapter | None


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return build_tiny_base(tmp_path_factory.mktemp("bases") / BASE_ID)


def make_lane(
    base_folder: Path, *, max_rows: int = 8, max_cache_tokens: int = 2048, max_draft_tokens: int = 0
) -> Lane:
    limits = {"max_rows": max_rows, "max_cache_tokens": max_cache_tokens}
    model = load_plain(base_folder)
    return pack(model, base_folder, PROBE_IDS, **limits, max_draft_tokens=max_draft_tokens).lane


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> list[Model]:
    folder, plain = tmp_path_factory.mktemp("artifacts"), load_plain(base_folder)
    lane = make_lane(base_folder)
    weights = {name: module.weight for name, module in plain.named_modules() if hasattr(module, "weight")}
    found = [Model((BASE_ID, None), None, [greedy(plain, prompt, NUM_TOKENS) for prompt in PROMPTS])]
    for seed, tuning in enumerate(TUNINGS):
        artifact = build_method_artifact(folder / tuning_name(tuning), base_folder, tuning, seed=seed)
        parts = method_of_artifact(artifact.folder).read_parts(artifact.folder, read_shape(base_folder))
        assert parts is not None
        adapter = lay_out(parts, lane.model, weights.__getitem__)
        prepare(lane, adapter)
        answers = [method_greedy(base_folder, artifact.folder, prompt, NUM_TOKENS) for prompt in PROMPTS]
        found.append(Model((BASE_ID, artifact.digest), adapter, answers))
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


def run_dry(lane: Lane) -> None:
    for _ in range(2000):
        if not lane.has_work:
            return
        lane.step()
    raise AssertionError("the lane never ends")


def test_300_random_mixes_answer_token_by_token_as_each_method_does_alone(
    base_folder: Path, models: list[Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    lanes = [
        make_lane(base_folder, max_rows=rows, max_cache_tokens=tokens, max_draft_tokens=drafts)
        for rows, tokens, drafts in ((8, 2048, 0), (8, 2048, 7), (5, 240, 3), (3, 208, 7))
    ]
    assert all(model.adapter is None or model.adapter.num_bytes > 0 for model in models)
    num_shared: list[int] = []
    start = PagePool.start

    def counted(pool: PagePool, *args: Any, **options: Any) -> Chain:
        chain = start(pool, *args, **options)
        num_shared.append(chain.num_named)
        return chain

    monkeypatch.setattr(PagePool, "start", counted)
    for seed in range(NUM_MIXES):
        dice = random.Random(seed)
        lane = lanes[seed % len(lanes)]
        mix = [ask(dice.choice(models), dice.randrange(len(PROMPTS))) for _ in range(dice.randint(2, 9))]
        for asked in mix:
            lane.add(asked.sequence)
            for _ in range(dice.randint(0, 6)):
                lane.step()
        run_dry(lane)
        for asked in mix:
            assert asked.token_ids == asked.expected, (seed, asked.sequence.key)
            assert isinstance(asked.events[-1], Finish)
    # Rows were pushed out and pages shared, or the equality above says less than it seems.
    assert sum(lane.measures.num_preempted for lane in lanes) > 10
    assert sum(count > 0 for count in num_shared) > 100
    num_right = sum(lane.measures.num_right_guesses for lane in lanes)
    assert 100 < num_right < sum(lane.measures.num_guesses for lane in lanes) - 100
    # Nothing is lost: all pages can be had again.
    assert all(lane._pool.num_free == lane._pool.num_pages for lane in lanes)


def test_a_row_whose_client_leaves_gives_its_pages_back_before_the_next_step(
    base_folder: Path, models: list[Model]
) -> None:
    lane = make_lane(base_folder)
    leaving, staying = ask(models[0], 1), ask(models[1], 1)
    for asked in (leaving, staying):
        lane.add(asked.sequence)
    lane.step()
    leaving.sequence.cancel()
    lane.step()
    assert lane.num_rows == 1
    run_dry(lane)
    assert staying.token_ids == staying.expected


def test_a_long_prompt_runs_in_stretches_while_others_answer_and_short_ones_go_before_it(
    base_folder: Path, models: list[Model]
) -> None:
    lane = make_lane(base_folder)
    running, long, short = ask(models[0], 1), ask(models[0], 4), ask(models[2], 1)
    lane.add(running.sequence)
    lane.step()
    lane.add(long.sequence)
    lane.step()
    assert running.sequence.num_completion_tokens == 2 and long.sequence.num_completion_tokens == 0
    lane.add(short.sequence)
    lane.step()
    assert short.sequence.num_completion_tokens == 1 and long.sequence.num_completion_tokens == 0
    run_dry(lane)
    for asked in (running, long, short):
        assert asked.token_ids == asked.expected
    assert len(PROMPTS[4]) > MAX_SHORT_TOKENS


@pytest.mark.parametrize(
    ("num_tokens", "stretches"),
    [
        (MAX_LONG_TOKENS + 1, [MAX_LONG_TOKENS + 1]),
        (MAX_SHORT_TOKENS, [MAX_SHORT_TOKENS]),
        (MAX_SHORT_TOKENS + 1, [MAX_LONG_TOKENS, MAX_SHORT_TOKENS + 1 - MAX_LONG_TOKENS]),
        (MAX_LONG_TOKENS + MAX_SHORT_TOKENS, [MAX_LONG_TOKENS, MAX_SHORT_TOKENS]),
    ],
)
def test_a_prompt_is_run_at_once_or_in_stretches_and_its_rest_at_once(
    base_folder: Path, models: list[Model], num_tokens: int, stretches: list[int]
) -> None:
    lane, seen = make_lane(base_folder), []
    step = lane.model.step

    def see(work: list[Stretch], **options: Any) -> Logits:
        seen.extend(len(one) for one in work)
        return step(work, **options)

    lane.model.step = see  # type: ignore[method-assign,assignment]
    asked = ask(models[0], 4, max_tokens=1)
    asked.sequence.prompt_ids = PROMPTS[4][:num_tokens]
    lane.add(asked.sequence)
    run_dry(lane)
    assert seen == stretches


def test_a_long_prompt_is_not_passed_over_for_ever(base_folder: Path, models: list[Model]) -> None:
    lane = make_lane(base_folder, max_rows=4)
    long = ask(models[0], 4)
    lane.add(long.sequence)
    for _ in range(60):
        lane.add(ask(models[1], 1, max_tokens=1).sequence)
        lane.step()
    assert long.sequence.num_completion_tokens > 0


def test_a_projects_crowd_does_not_keep_another_projects_request_from_a_row(
    base_folder: Path, models: list[Model]
) -> None:
    lane = make_lane(base_folder, max_rows=2)
    crowd = [ask(models[0], 1, "crowd") for _ in range(6)]
    single = ask(models[1], 1, "single")
    for asked in (*crowd, single):
        lane.add(asked.sequence)
    lane.step()
    assert single.sequence.num_completion_tokens == 1
    run_dry(lane)


def test_a_row_that_fails_in_a_step_fails_alone(
    base_folder: Path, models: list[Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = make_lane(base_folder)
    bad, good = ask(models[1], 1), ask(models[2], 1)
    step = lane.model.step

    def failing(stretches: Any, **how: Any) -> Any:
        described = models[1].adapter.described if models[1].adapter else None
        if any(one.adapter is described for one in stretches):
            raise RuntimeError("the adapter is broken")
        return step(stretches, **how)

    monkeypatch.setattr(lane.model, "step", failing)
    for asked in (bad, good):
        lane.add(asked.sequence)
    run_dry(lane)
    assert good.token_ids == good.expected
    assert isinstance(bad.events[-1], Failure)


def test_a_row_whose_logits_are_not_finite_fails_alone(base_folder: Path, models: list[Model]) -> None:
    lane = make_lane(base_folder)
    bad, good = ask(models[1], 1), ask(models[2], 1)
    for asked in (bad, good):
        lane.add(asked.sequence)
    lane.step()
    [row] = [row for row in lane._rows if row.sequence is bad.sequence]
    lane.model.pages.values[:, row.chain.pages[0]] = torch.nan
    run_dry(lane)
    assert good.token_ids == good.expected
    assert isinstance(bad.events[-1], Failure)


def test_an_answer_larger_than_all_pages_fails_with_the_setting_and_the_lane_goes_on(
    base_folder: Path, models: list[Model]
) -> None:
    lane = make_lane(base_folder, max_cache_tokens=64)
    large, small = ask(models[0], 4), ask(models[0], 1)
    for asked in (large, small):
        lane.add(asked.sequence)
    run_dry(lane)
    failure = large.events[-1]
    assert isinstance(failure, Failure) and isinstance(failure.error, OutOfMemoryError)
    assert "LUTHIER_MAX_CACHE_TOKENS" in failure.error.message
    assert small.token_ids == small.expected


def test_what_was_asked_is_given_back_whole_when_the_lane_is_emptied(
    base_folder: Path, models: list[Model]
) -> None:
    lane = make_lane(base_folder, max_rows=1)
    asked = [ask(models[0], 1), ask(models[1], 1)]
    for one in asked:
        lane.add(one.sequence)
    lane.step()
    assert set(lane.drain()) == {one.sequence for one in asked}
    assert not lane.has_work and lane._pool.num_free == lane._pool.num_pages


def test_the_farther_a_long_prompt_has_come_the_fewer_of_its_tokens_run_at_once() -> None:
    counts = [most_of_long(num_done) for num_done in range(0, 9000, 100)]
    assert counts[0] == MAX_LONG_TOKENS and counts == sorted(counts, reverse=True)
    assert set(counts) == {16, 32}
    # 16 are what kernels take at a time; more are no more work than so many pairs.
    assert all(count == 16 or count * 100 * place <= 1 << 16 for place, count in enumerate(counts))


def test_verification_takes_pages_from_running_answers_which_stay_what_they_were(
    base_folder: Path, models: list[Model]
) -> None:
    # The longest prompt, its answer and virtual tokens take nearly all of the pages.
    lane = make_lane(base_folder, max_cache_tokens=192)
    for model in models[1:]:
        running = ask(models[0], 4)
        lane.add(running.sequence)
        for _ in range(4):
            lane.step()
        assert model.adapter is not None
        verify_adapter(lane, model.adapter, PROBE_IDS, None)
        run_dry(lane)
        assert running.token_ids == running.expected
    assert lane.measures.num_preempted > 0
    assert lane._pool.num_free == lane._pool.num_pages
