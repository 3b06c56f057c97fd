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
from luthier.core.specs import BaseFacts
from luthier.data.tokens import Tokenizer
from luthier.inference.bases import LoadedBase, ServedModel, pack
from luthier.inference.copies import verify_copy
from luthier.inference.generation import Generation
from luthier.inference.lane import Lane
from luthier.inference.loaded import LoadedArtifacts
from luthier.inference.loading import RowLimits
from luthier.inference.plans import Plan
from luthier.inference.sequence import Failure, Finish, SamplingOptions
from luthier.inference.trials import Trial
from luthier.modeling.packed_work import Stretch
from tests.unit.inference.artifacts import build_method_artifact, load_plain

# `base_folder` and `models` are fixtures.
from tests.unit.inference.test_lane import (
    PROBE_IDS,
    Asked,
    Model,
    ServedStub,
    ask,
    base_folder,
    make_lane,
    models,
    run_dry,
)

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
    assert is_refused(waiting, SelfCheckError) and lane.num_waiting <= 1
    run_dry(lane)
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
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda one, two: len(one) == 2 or equal(one, two))
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


class LateEngine:
    """Does what it is asked when it is told to."""

    def __init__(self) -> None:
        self.works: list[Callable[[], Any]] = []

    def call(self, work: Callable[[], Any]) -> Future[Any]:
        self.works.append(work)
        return Future()

    def sweep(self) -> Future[None]:
        done: Future[None] = Future()
        done.set_result(None)
        return done


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


def served_by(base: LoadedBase, base_folder: Path, folder: Path, scale: float) -> ServedModel:
    tuning = {"type": "lora", "rank": 2}
    made = build_method_artifact(folder, base_folder, tuning, seed=1, scale=scale)
    return ServedModel(base, made.digest, verify_copy(made.folder))


def make_loaded(engine: LateEngine) -> LoadedArtifacts:
    async def fit(_num_bytes: int) -> int:
        return 0

    return LoadedArtifacts(
        engine,
        max_whole_bytes=0,
        max_adapter_bytes=10**9,
        limits=RowLimits(max_rows=4, max_cache_tokens=256),
        max_waiting=9,
        fit=fit,
        has_room=bool,
    )


def test_a_model_may_be_asked_before_its_proof_and_a_failed_one_is_forgotten_but_not_its_successor(
    base: LoadedBase, base_folder: Path, tmp_path: Path
) -> None:
    served = served_by(base, base_folder, tmp_path / "a", scale=0.0)

    async def run() -> None:
        engine = LateEngine()
        loaded = make_loaded(engine)
        first = await loaded.hold(served)
        assert first.trial is not None and first.lane is not None and not first.trial.told.done()
        [entry] = loaded._entries.values()
        assert not entry.is_ready and not entry.is_idle
        # The proof that nobody brought a request for is asked for by itself.
        while not engine.works:
            await asyncio.sleep(0.001)
        engine.works.pop()()
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
    async def run(scale: float) -> None:
        engine: Any = LateEngine()
        served = served_by(base, base_folder, tmp_path / str(scale), scale)
        served = replace(served, base=replace(base, tokenizer=Tokenizer.load(base_folder)))
        ready = await make_loaded(engine).hold(served)
        generation = Generation(ready, Plan([[5, 6]], SamplingOptions(max_tokens=0)))
        submitting = asyncio.create_task(generation.submit(engine))
        while not engine.works:
            await asyncio.sleep(0.001)
        assert not submitting.done()
        engine.works.pop()()
        await submitting
        assert [event async for _, event in generation.events()] == [Finish("length", 0)]

    asyncio.run(run(1.0))
    with pytest.raises(SelfCheckError, match="changes nothing"):
        asyncio.run(run(0.0))
