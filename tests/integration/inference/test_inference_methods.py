"""Artifacts of every method in one server, beside what their methods themselves say."""

import asyncio
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.core.inference import HEADER_DIGEST, ModelTarget
from luthier.data.rendering.tokenizer import Tokenizer
from luthier.inference.models import loading as loading_module
from luthier.inference.models.loading import Kind, measure_weights
from luthier.methods import discover
from tests.conftest import wait_until
from tests.inference_server import BARE, CHAT, Served, prompt_ids, publish, text_of, user
from tests.tiny import CONTEXT_LENGTH
from tests.unit.inference.artifacts import (
    Artifact,
    all_tunings,
    build_method_artifact,
    greedy,
    load_plain,
    method_greedy,
    tuning_name,
)

TEXTS = ["the sky", "what is the colour of the sea on a clear day?", "a"]
NUM_TOKENS = 24
WHOLE = [name for name, method in discover().items() if method.is_whole_model]


@dataclass(frozen=True)
class Case:
    """A model, and what it has to say to each text, in how many tokens."""

    target: ModelTarget
    folder: Path | None
    answers: dict[str, tuple[str, int]]


def to_text(tokenizer: Tokenizer, ids: list[int]) -> tuple[str, int]:
    """Return an answer's text up to its end, and its tokens with the end."""
    ends = [i for i, token in enumerate(ids) if token in tokenizer.stop_token_ids]
    return (tokenizer.decode(ids[: ends[0]]), ends[0] + 1) if ends else (tokenizer.decode(ids), len(ids))


@pytest.fixture(scope="module")
def cases(folder: Path, base_folder: Path) -> dict[str, Case]:
    tokenizer = Tokenizer.load(base_folder)
    plain = load_plain(base_folder)
    prompts = {text: prompt_ids(base_folder, text) for text in TEXTS}
    answers = {text: to_text(tokenizer, greedy(plain, ids, NUM_TOKENS)) for text, ids in prompts.items()}
    made = {"base": Case(BARE, None, answers)}
    for i, tuning in enumerate([*all_tunings(), *({"type": name} for name in WHOLE)]):
        name = f"{tuning_name(tuning)}-{i}"
        artifact = build_method_artifact(folder / f"tuned{i}", base_folder, tuning, seed=i)
        target = publish(folder, artifact.folder, f"tuned{i}", model=name)
        answers = {
            text: to_text(tokenizer, method_greedy(base_folder, artifact.folder, ids, NUM_TOKENS))
            for text, ids in prompts.items()
        }
        made[name] = Case(target, artifact.folder, answers)
    # They differ at all, or equality with them says nothing.
    assert len({frozenset(case.answers.items()) for case in made.values()}) == len(made)
    return made


def check(served: Served, case: Case, text: str) -> None:
    answer = served.chat(text, case.target, max_tokens=NUM_TOKENS)
    usage = answer["usage"]
    assert (text_of(answer), usage["completion_tokens"]) == case.answers[text], case.target.model
    assert usage["prompt_tokens"] == len(prompt_ids(served.base_folder, text))
    assert answer["model"] == case.target.model


def case_of(cases: dict[str, Case], method: str) -> Case:
    return next(case for name, case in cases.items() if name.startswith(method))


def unload(served: Served) -> None:
    """Let every artifact that no request needs leave, as if others had taken its place."""

    def leave() -> None:
        for kind in Kind:
            served.service.models.loaded._leave_idle(kind, lambda: False)

    on_loop(served, leave)


def on_loop(served: Served, work: Callable[[], None]) -> None:
    done = threading.Event()
    served.loop.call_soon_threadsafe(lambda: (work(), done.set()))
    assert done.wait(10)


def check_all_at_once(served: Served, cases: dict[str, Case]) -> None:
    asked = [(case, text) for text in TEXTS for case in cases.values()]
    served.steps.gate.clear()
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = [pool.submit(check, served, case, text) for case, text in asked]
        # As many as can be are there before any runs; a model that must be loaded first comes later.
        wait_until(lambda: served.engine.has_work, "the first requests")
        served.steps.gate.set()
        for future in answers:
            future.result()


def test_every_methods_artifact_answers_as_its_method_says_in_turn_with_the_others_and_the_base(
    served: Served, cases: dict[str, Case]
) -> None:
    for text in TEXTS[:2]:
        for case in cases.values():
            check(served, case, text)
            check(served, cases["base"], text)


def test_requests_for_all_models_at_once_all_come_back_right(served: Served, cases: dict[str, Case]) -> None:
    check_all_at_once(served, cases)


def test_models_that_push_each_other_out_of_memory_answer_right_all_the_same(
    served: Served, cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = served.service.models.loaded
    unload(served)
    whole = case_of(cases, WHOLE[0])
    check(served, whole, TEXTS[0])
    monkeypatch.setitem(loaded._max_bytes, Kind.WHOLE, loaded.num_bytes(Kind.WHOLE))
    others = [c.folder for name, c in cases.items() if c.folder and not name.startswith(tuple(WHOLE))]
    largest = max(measure_weights(folder, torch.float32) for folder in others)
    monkeypatch.setitem(loaded._max_bytes, Kind.PACKED, largest)
    for _ in range(2):
        for case in cases.values():
            check(served, case, TEXTS[2])
            assert 0 <= loaded.num_bytes(Kind.PACKED) <= largest
    check_all_at_once(served, cases)


def test_an_answer_says_which_artifact_made_it(served: Served, cases: dict[str, Case]) -> None:
    for case in cases.values():
        response = served.post(CHAT, case.target, messages=user("a"), max_tokens=1, temperature=0)
        if case.target.digest is not None:
            assert response.headers[HEADER_DIGEST] == case.target.digest
            fingerprint = case.target.digest.removeprefix("sha256:")[:12] + "-float32"
            assert response.json()["system_fingerprint"] == fingerprint


@pytest.mark.parametrize(("method", "num_virtual"), [("prefix", 5), ("prompt", 3), ("lora", 0)])
def test_virtual_tokens_shorten_the_context_and_the_refusal_says_so(
    served: Served, cases: dict[str, Case], method: str, num_virtual: int
) -> None:
    case = case_of(cases, method)
    room = CONTEXT_LENGTH - num_virtual - len(prompt_ids(served.base_folder, "a"))
    refused = served.post(CHAT, case.target, messages=user("a"), max_tokens=room + 1)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"]) == (400, "context_length_exceeded")
    assert f"{CONTEXT_LENGTH - num_virtual} tokens" in error["message"]
    # Right up to the last position.
    answer = served.chat("a", case.target, max_tokens=room)
    if answer["choices"][0]["finish_reason"] == "length":
        assert answer["usage"]["completion_tokens"] == room
    assert answer["usage"]["prompt_tokens"] == len(prompt_ids(served.base_folder, "a"))


@pytest.mark.usefixtures("_copies")
def test_a_damaged_copy_is_fetched_again_whatever_its_method(served: Served, cases: dict[str, Case]) -> None:
    for case in cases.values():
        if case.folder is None:
            continue
        unload(served)
        # Linked before, and its other name would be damaged with it.
        shutil.rmtree(asyncio.run(served.service.models.get(case.target)).copy.folder)
        served.service.models._served.clear()
        copy = asyncio.run(served.service.models.get(case.target)).copy
        weights = next(copy.folder.glob("*.safetensors"))
        content = weights.read_bytes()
        # Its size stays: only reading it again shows it.
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        check(served, case, TEXTS[2])
        assert weights.read_bytes() == content


def test_others_are_answered_while_a_whole_model_is_loaded(
    served: Served, cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, is_loading = threading.Event(), threading.Event()
    load = loading_module._load_full

    def load_slowly(*args: Any, **options: Any) -> Any:
        is_loading.set()
        assert gate.wait(30)
        return load(*args, **options)

    monkeypatch.setattr(loading_module, "_load_full", load_slowly)
    unload(served)
    whole = case_of(cases, WHOLE[0])
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(check, served, whole, text) for text in TEXTS[:2]]
        assert is_loading.wait(30)
        for case in cases.values():
            if not case.target.model.startswith(WHOLE[0]):
                check(served, case, TEXTS[2])
        assert not any(future.done() for future in asked)
        gate.set()
        for future in asked:
            future.result()


def test_a_whole_model_stays_while_its_rows_run_and_leaves_when_another_needs_its_memory(
    served: Served, cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = served.service.models.loaded
    unload(served)
    first, second = (case for name, case in cases.items() if name.startswith(WHOLE[0]))
    check(served, first, TEXTS[0])
    monkeypatch.setitem(loaded._max_bytes, Kind.WHOLE, loaded.num_bytes(Kind.WHOLE))
    served.steps.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        before = served.steps.num_prefills
        running = pool.submit(check, served, first, TEXTS[0])
        wait_until(lambda: served.steps.num_prefills > before, "its prefill")
        waiting = pool.submit(check, served, second, TEXTS[0])
        wait_until(loaded._turns[Kind.WHOLE].locked, "the other's turn")
        assert loaded.digests[-1] == first.target.digest
        served.steps.gate.set()
        running.result()
        waiting.result()
    assert loaded.digests[-1] == second.target.digest


def test_a_whole_model_beyond_the_memory_for_them_is_refused_and_the_rest_answers_on(
    served: Served, cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    unload(served)
    monkeypatch.setitem(served.service.models.loaded._max_bytes, Kind.WHOLE, 1000)
    case = case_of(cases, WHOLE[0])
    refused = served.post(CHAT, case.target, messages=user("a"))
    assert refused.json()["error"]["code"] == "out_of_memory"
    assert "LUTHIER_INFERENCE_MAX_WHOLE_MODELS_BYTES" in refused.json()["error"]["message"]
    check(served, cases["base"], TEXTS[0])


def test_artifacts_on_a_whole_model_answer_as_trained_there_though_their_copies_vanish(
    served: Served, cases: dict[str, Case], folder: Path, base_folder: Path
) -> None:
    whole = case_of(cases, WHOLE[0])
    assert whole.folder is not None
    full = Artifact(str(whole.target.digest), whole.folder)
    tokenizer, ids = Tokenizer.load(base_folder), prompt_ids(base_folder, TEXTS[0])
    for seed, tuning in enumerate(({"type": "lora", "rank": 2}, {"type": "prompt", "num_virtual_tokens": 3})):
        made = build_method_artifact(folder / f"on{seed}", base_folder, tuning, seed=seed, on=full)
        below = {"full_model": whole.target.artifact, "full_model_digest": whole.target.digest}
        target = publish(folder, made.folder, f"on{seed}", **below)
        answer = to_text(tokenizer, method_greedy(full.folder, made.folder, ids, NUM_TOKENS))
        case = Case(target, made.folder, {TEXTS[0]: answer})
        assert answer not in (whole.answers[TEXTS[0]], cases["base"].answers[TEXTS[0]])
        check(served, case, TEXTS[0])
        unload(served)
        shutil.rmtree(folder / "cache" / "artifacts")
        for each in (case, whole, cases["base"]):
            check(served, each, TEXTS[0])
