"""An adapter proves itself in the first step that it is asked in; nothing of it is told, or kept, before."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.bases.catalogue import FACTS_NAME
from luthier.core.canary import Canary
from luthier.core.errors import LuthierError, OutOfMemoryError, SelfCheckError, UnavailableError
from luthier.core.shapes import read_shape
from luthier.core.specs import BaseFacts
from luthier.data.tokens import Tokenizer
from luthier.inference.bases import LoadedBase, ServedModel, pack
from luthier.inference.generation import Generation
from luthier.inference.lane import Lane
from luthier.inference.plans import Plan
from luthier.inference.sequence import Failure, Finish, SamplingOptions
from luthier.inference.trials import Trial
from luthier.methods import method_of_artifact
from luthier.modeling.packed_adapter import lay_out
from luthier.modeling.packed_work import Stretch
from tests.tiny import BASE_ID
from tests.unit.inference.artifacts import build_method_artifact, load_plain

# `base_folder` and `models` are fixtures.
from tests.unit.inference.test_lane import (
    PROBE_IDS,
    PROMPTS,
    Asked,
    Model,
    ServedStub,
    ask,
    base_folder,
    make_lane,
    models,
    run_dry,
)
from tests.unit.inference.test_loaded import InlineEngine, make_loaded, served_by

__all__ = ["base_folder", "models"]

WRONG = Canary(token_ids=[9, 30, 41], candidates=[1, 2], logits=[90.0, -90.0], precision="float32")


def ask_unproved(model: Model, number: int, canary: Canary | None = None) -> tuple[Asked, Trial]:
    """Return a request for an adapter that is still to prove itself."""
    assert model.adapter is not None
    asked, trial = ask(model, number), Trial(model.adapter, PROBE_IDS, canary)
    asked.sequence.served = ServedStub(model.adapter, trial)
    return asked, trial


def with_same_trial(model: Model, number: int, trial: Trial) -> Asked:
    asked = ask(model, number)
    asked.sequence.served = ServedStub(model.adapter, trial)
    return asked


def count_steps(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Collect how many stretches each step of the model has."""
    counts: list[int] = []
    step = lane.model.step

    def counted(stretches: list[Stretch], *arguments: Any, **options: Any) -> Any:
        counts.append(len(stretches))
        return step(stretches, *arguments, **options)

    monkeypatch.setattr(lane.model, "step", counted)
    return counts


def is_refused(asked: Asked, error: type[LuthierError]) -> bool:
    """Whether a request got an error and nothing else."""
    return [type(event) for event in asked.events] == [Failure] and isinstance(asked.events[0].error, error)


def test_the_proof_shares_the_first_step_of_every_kind_of_adapter_and_changes_no_answer(
    base_folder: Path, models: list[Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = make_lane(base_folder)
    counts = count_steps(lane, monkeypatch)
    running = ask(models[0], 2)
    lane.add(running.sequence)
    lane.step()
    for model in models[1:]:
        (asked, trial), number = ask_unproved(model, 1), len(counts)
        lane.add(asked.sequence)
        assert not trial.told.done()
        lane.step()
        # Five stretches are the proof's: the text in two, the base's beginning, and a row of each.
        assert len(counts) == number + 1 and counts[-1] == 5 + 1 + (not running.sequence.is_done)
        assert trial.told.result(timeout=0) is None
        assert asked.sequence.num_completion_tokens == 1
        run_dry(lane)
        assert asked.token_ids == asked.expected
    assert running.token_ids == running.expected
    assert lane._pool.num_free == lane._pool.num_pages


def test_who_fails_his_proof_gets_no_token_leaves_no_page_and_harms_nobody(
    base_folder: Path, models: list[Model]
) -> None:
    lane = make_lane(base_folder)
    running, beside = ask(models[0], 4), ask(models[2], 3)
    lane.add(running.sequence)
    lane.step()
    (failing, trial) = ask_unproved(models[1], 3, WRONG)
    second = with_same_trial(models[1], 2, trial)
    for asked in (failing, beside, second):
        lane.add(asked.sequence)
    lane.step()
    late = with_same_trial(models[1], 3, trial)
    lane.add(late.sequence)
    for asked in (failing, second, late):
        assert is_refused(asked, SelfCheckError)
    with pytest.raises(SelfCheckError, match="training recorded"):
        trial.told.result(timeout=0)
    run_dry(lane)
    for asked in (running, beside):
        assert asked.token_ids == asked.expected and isinstance(asked.events[-1], Finish)
    # What it computed is no beginning of anybody's.
    assert models[1].adapter is not None
    tokens = [*range(-1, -models[1].adapter.num_virtual_tokens - 1, -1), *failing.sequence.prompt_ids]
    assert lane._pool.start(models[1].key, tokens, owner="p").num_named == 0


def test_those_who_wait_for_a_row_are_told_of_a_failed_proof_too(
    base_folder: Path, models: list[Model]
) -> None:
    lane = make_lane(base_folder, max_rows=1)
    running = ask(models[0], 1)
    lane.add(running.sequence)
    lane.step()
    waiting, _ = ask_unproved(models[1], 1, WRONG)
    lane.add(waiting.sequence)
    lane.step()
    assert is_refused(waiting, SelfCheckError)
    run_dry(lane)
    assert lane.num_waiting == 0
    assert running.token_ids == running.expected


@pytest.mark.parametrize("fault", ["step", "begin", "judge"])
def test_a_proof_that_breaks_down_breaks_nobody_else_and_the_log_says_where(
    base_folder: Path, models: list[Model], monkeypatch: pytest.MonkeyPatch, fault: str, caplog: Any
) -> None:
    lane = make_lane(base_folder)
    running = ask(models[0], 3)
    lane.add(running.sequence)
    lane.step()
    asked, trial = ask_unproved(models[1], 1)
    step = lane.model.step

    def break_down(stretches: list[Stretch], *arguments: Any, **options: Any) -> Any:
        if any(one.num_first_logits for one in stretches):
            raise RuntimeError("no such kernel")
        return step(stretches, *arguments, **options)

    def raise_out_of_memory(*_: Any) -> None:
        raise OutOfMemoryError("No pages.")

    if fault == "step":
        monkeypatch.setattr(lane.model, "step", break_down)
    elif fault == "begin":
        monkeypatch.setattr("luthier.inference.trials.prepare", raise_out_of_memory)
    else:
        monkeypatch.setattr("luthier.inference.trials.check_row", lambda *_: 1 / 0)
    lane.add(asked.sequence)
    lane.step()
    assert is_refused(asked, OutOfMemoryError if fault == "begin" else LuthierError)
    assert isinstance(trial.told.exception(timeout=0), LuthierError)
    assert (fault == "begin") == ("The proof of an adapter" not in caplog.text)
    run_dry(lane)
    assert running.token_ids == running.expected
    assert lane._pool.num_free == lane._pool.num_pages


def test_a_small_change_is_looked_for_in_a_step_more_which_leaves_others_their_tokens(
    base_folder: Path, models: list[Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    lane = make_lane(base_folder)
    running = [ask(models[place], 3) for place in (0, 2)]
    for other in running:
        lane.add(other.sequence)
    lane.step()
    counts = count_steps(lane, monkeypatch)
    asked, trial = ask_unproved(models[1], 1)
    # As if rounding had left nothing of it at the beginning.
    monkeypatch.setattr("luthier.inference.trials.CANARY_TOLERANCE", 1e9)
    lane.add(asked.sequence)
    lane.step()
    assert counts[1:] == [2] and trial.told.result(timeout=0) is None
    run_dry(lane)
    for one in (asked, *running):
        assert one.token_ids == one.expected


def test_a_lane_that_is_given_up_says_so_to_those_who_wait_for_a_proof(
    base_folder: Path, models: list[Model]
) -> None:
    lane = make_lane(base_folder)
    asked, trial = ask_unproved(models[1], 1)
    lane.add(asked.sequence)
    assert lane.drain() == [asked.sequence] and not lane.has_work
    with pytest.raises(UnavailableError):
        trial.told.result(timeout=0)


class LateEngine(InlineEngine):
    """Does what it is asked when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Callable[[], Any], Future[Any]]] = []

    def call(self, work: Callable[[], Any]) -> Future[Any]:
        done: Future[Any] = Future()
        self._calls.append((work, done))
        return done

    async def work(self, error: Exception | None = None) -> None:
        """Do what is asked next, or fail at it."""
        while not self._calls:
            await asyncio.sleep(0.001)
        work, done = self._calls.pop(0)
        if error is None:
            done.set_result(work())
        else:
            done.set_exception(error)


@pytest.fixture
def base(base_folder: Path) -> LoadedBase:
    plain: Any = load_plain(base_folder)
    nothing: Any = None
    return LoadedBase(
        facts=BaseFacts.model_validate_json((base_folder / FACTS_NAME).read_bytes()),
        tokenizer=nothing,
        template=nothing,
        device=torch.device("cpu"),
        dtype=torch.float32,
        probe_ids=PROBE_IDS,
        packed=pack(plain, base_folder, PROBE_IDS, max_rows=4, max_cache_tokens=512),
    )


def published(base: LoadedBase, base_folder: Path, folder: Path, scale: float) -> ServedModel:
    tuning = {"type": "lora", "rank": 2}
    return served_by(base, build_method_artifact(folder, base_folder, tuning, seed=1, scale=scale))


def test_a_model_may_be_asked_before_its_proof_and_a_failed_one_is_forgotten_but_not_its_successor(
    base: LoadedBase, base_folder: Path, tmp_path: Path
) -> None:
    served = published(base, base_folder, tmp_path / "a", scale=0.0)

    async def run() -> None:
        engine = LateEngine()
        loaded = make_loaded(0, engine=engine)
        first = await loaded.hold(served)
        assert first.trial is not None and first.lane is not None and not first.trial.told.done()
        [entry] = loaded._entries.values()
        assert not entry.is_ready and not entry.is_idle
        # The proof that nobody brought a request for is asked for by itself.
        await engine.work()
        await asyncio.wait([entry.loading])
        assert isinstance(first.trial.error, SelfCheckError) and loaded.digests == []
        second = await loaded.hold(served)
        [successor] = loaded._entries.values()
        assert second is not first and successor.num_holders == 1
        loaded.release(first)
        assert successor.num_holders == 1
        loaded.release(second)
        assert successor.num_holders == 0
        successor.loading.cancel()

    asyncio.run(run())


def test_an_answer_of_no_tokens_waits_for_the_proof(
    base: LoadedBase, base_folder: Path, tmp_path: Path
) -> None:
    async def run(scale: float, error: Exception | None = None) -> list[Any]:
        engine: Any = LateEngine()
        served = published(base, base_folder, tmp_path / str(scale), scale)
        served = replace(served, base=replace(base, tokenizer=Tokenizer.load(base_folder)))
        ready = await make_loaded(0, engine=engine).hold(served)
        generation = Generation(ready, Plan([[5, 6]], SamplingOptions(max_tokens=0)))
        generation.submit(engine)
        following = asyncio.create_task(anext(generation.events()))
        await asyncio.sleep(0.02)
        assert not following.done()
        await engine.work(error)
        return list(await following)

    assert asyncio.run(run(1.0)) == [0, Finish("length", 0)]
    with pytest.raises(SelfCheckError, match="changes nothing"):
        asyncio.run(run(0.0))
    # An engine that ends tells those who wait.
    with pytest.raises(UnavailableError, match="proved"):
        asyncio.run(run(1.5, UnavailableError("The model server was stopped; try again.")))


def test_a_proof_that_finds_too_few_pages_makes_room_and_nobody_dies_of_it(
    base_folder: Path, models: list[Model]
) -> None:
    # The longest prompt, its answer and virtual tokens take nearly all of the pages.
    lane = make_lane(base_folder, max_cache_tokens=192)
    for model in models[1:]:
        for number in (1, 4):
            asked, trial = ask_unproved(model, number)
            lane.add(asked.sequence)
            run_dry(lane)
            assert asked.token_ids == asked.expected and trial.told.result(timeout=0) is None
    running = ask(models[0], 3)
    lane.add(running.sequence)
    lane.step()
    others = [ask_unproved(model, 1) for model in models[1:]]
    for asked, _ in others:
        lane.add(asked.sequence)
    run_dry(lane)
    assert running.token_ids == running.expected
    for asked, trial in others:
        assert asked.token_ids == asked.expected and trial.told.result(timeout=0) is None
    assert lane._pool.num_free == lane._pool.num_pages
    assert lane.measures.num_preempted > 0


@pytest.mark.parametrize("num_pages", [6, 7, 8])
def test_the_only_answer_goes_on_after_a_proof_that_has_its_next_page(
    base_folder: Path, models: list[Model], num_pages: int
) -> None:
    for num_steps in range(12):
        lane = make_lane(base_folder, max_cache_tokens=16 * num_pages)
        running = ask(models[0], 3)
        lane.add(running.sequence)
        for _ in range(num_steps):
            lane.step()
        asked, trial = ask_unproved(models[1], 1)
        lane.add(asked.sequence)
        run_dry(lane)
        assert running.token_ids == running.expected, num_steps
        assert asked.token_ids == asked.expected and trial.told.result(timeout=0) is None, num_steps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_that_changes_nothing_is_told_among_others_too(
    base_folder: Path, models: list[Model], tmp_path: Path, dtype: torch.dtype
) -> None:
    made = build_method_artifact(tmp_path / "a", base_folder, {"type": "lora", "rank": 2}, seed=1, scale=0.0)
    plain = load_plain(base_folder).to(dtype)
    lane = pack(plain, base_folder, PROBE_IDS, max_rows=8, max_cache_tokens=2048).lane
    parts = method_of_artifact(made.folder).read_parts(made.folder, read_shape(base_folder))
    assert parts is not None
    nothing: Any = None
    empty = Model((BASE_ID, made.digest), lay_out(parts, lane.model, nothing), [[]] * len(PROMPTS))
    for number in range(len(PROMPTS)):
        running = [ask(models[0], other) for other in (1, 4, 2)]
        for one in running:
            lane.add(one.sequence)
            lane.step()
        asked, _ = ask_unproved(empty, number)
        lane.add(asked.sequence)
        lane.step()
        assert is_refused(asked, SelfCheckError)
        run_dry(lane)
        assert all(isinstance(one.events[-1], Finish) for one in running)
