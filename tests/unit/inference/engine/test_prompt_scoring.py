"""Log-probabilities of prompts, beside transformers' own over the whole text, on both paths."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.core.shapes import read_shape
from luthier.inference.engine.sequence import Choice, Failure, Finish, PromptScored, SequenceEvent
from luthier.inference.engine.step import BatchExecutor
from luthier.inference.runners.reference import ReferenceRunner
from luthier.methods import method_of_artifact
from luthier.modeling.protocols import AdapterInfo, AdapterSource
from luthier_cpu.decode.sampling import Logits
from tests.tiny_shapes import SHAPES, build_shape
from tests.unit.inference import sequences
from tests.unit.inference.artifacts import (
    build_method_artifact,
    load_plain,
    make_artifact,
    method_greedy,
    method_logits,
    pack,
)
from tests.unit.inference.sequences import Asked, run

PROMPTS = [[9], [5, 6, 7, 8, 9, 10, 11], [(7 * number) % 250 + 3 for number in range(150)]]
NUM_TOKENS = 30
TUNINGS: list[dict[str, Any]] = [
    {"type": "lora", "rank": 4},
    {"type": "prefix", "num_virtual_tokens": 5, "init": "random"},
]


@dataclass
class Model:
    """An adapter and its artifact's folder."""

    adapter: AdapterInfo
    source: AdapterSource
    folder: Path


def make_executor(
    base_folder: Path, models: list[Model] | None = None, *, max_cache_tokens: int = 2048
) -> BatchExecutor:
    limits = {"max_rows": 8, "max_cache_tokens": max_cache_tokens}
    executor = pack(load_plain(base_folder), base_folder, **limits)
    for model in models or ():
        assert executor.runner.add_adapter(model.source) == model.adapter
    return executor


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, base_folder: Path) -> list[Model]:
    folder, executor = tmp_path_factory.mktemp("artifacts"), make_executor(base_folder)
    found = []
    for seed, tuning in enumerate(TUNINGS):
        artifact = build_method_artifact(folder / tuning["type"], base_folder, tuning, seed=seed)
        parts = method_of_artifact(artifact.folder).read_parts(artifact.folder, read_shape(base_folder))
        source = AdapterSource(artifact.folder, parts)
        adapter = executor.runner.add_adapter(source)
        found.append(Model(adapter, source, artifact.folder))
    return found


def ask(model: Model, prompt: list[int], max_tokens: int, num_prompt_logprobs: int | None) -> Asked:
    how: dict[str, Any] = {"num_prompt_logprobs": num_prompt_logprobs, "stop_token_ids": [2]}
    return sequences.ask(prompt, max_tokens, adapter=model.adapter, **how)


def check_scores(event: SequenceEvent, prompt: list[int], logits_TV: torch.Tensor, num_top: int) -> None:
    assert isinstance(event, PromptScored)
    first, *rest = event.choices
    assert first == Choice(prompt[0])
    logprobs_TV = torch.log_softmax(logits_TV, dim=-1)
    assert [choice.token_id for choice in rest] == prompt[1:]
    for choice, row_V in zip(rest, logprobs_TV[:-1], strict=True):
        assert choice.logprob == pytest.approx(float(row_V[choice.token_id]), abs=2e-4)
        values = [value for _, value in choice.top]
        assert values == pytest.approx(row_V.topk(num_top).values.tolist(), abs=2e-4)


@pytest.mark.parametrize("max_cache_tokens", [2048, 240])
def test_prompts_are_scored_among_answers_and_change_none_of_them(base_folder, models, max_cache_tokens):
    executor = make_executor(base_folder, models, max_cache_tokens=max_cache_tokens)
    answered, scored = [], []
    for model in models:
        for prompt in PROMPTS:
            # The same prompt first without scores, so that there are blocks to share.
            for max_tokens, num_top in ((NUM_TOKENS, None), (0, 0), (NUM_TOKENS, 3)):
                asked = ask(model, prompt, max_tokens, num_top)
                answered.append((model, max_tokens, asked))
                if num_top is not None:
                    scored.append((model, num_top, asked))
                executor.scheduler.add(asked.sequence)
                executor.step()
    run(executor)
    assert executor.scheduler.pool.num_free == executor.scheduler.pool.num_blocks
    assert (executor.measures.num_preempted > 0) == (max_cache_tokens == 240)
    for model, num_top, asked in scored:
        prompt = asked.sequence.prompt_ids
        check_scores(asked.events[0], prompt, method_logits(base_folder, model.folder, prompt), num_top)
    greedy_of = {
        (model.folder, len(prompt)): method_greedy(base_folder, model.folder, prompt, NUM_TOKENS)
        for model in models
        for prompt in PROMPTS
    }
    for model, max_tokens, asked in answered:
        expected = greedy_of[model.folder, len(asked.sequence.prompt_ids)][:max_tokens]
        assert asked.token_ids == (expected[: expected.index(2)] if 2 in expected else expected)
        assert isinstance(asked.events[-1], Finish)
        assert sum(isinstance(event, PromptScored) for event in asked.events) <= 1


def test_a_prompt_whose_logits_are_not_finite_fails_alone(base_folder, models, monkeypatch):
    executor = make_executor(base_folder, models)
    bad, good = (ask(model, PROMPTS[1], 4, 1) for model in models)
    step = executor.runner.model.step

    def poisoned(chunks: Any, **how: Any) -> Logits:
        logits: Logits = step(chunks, **how)
        if chunks[0].adapter is executor.runner._adapters[models[0].adapter.adapter].descriptor:
            logits.held_RV[1] = torch.nan
        return logits

    monkeypatch.setattr(executor.runner.model, "step", poisoned)
    run(executor, bad, good)
    assert [type(event) for event in bad.events] == [Failure]
    assert isinstance(good.events[0], PromptScored) and isinstance(good.events[-1], Finish)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_the_reference_runner_scores_prompts_of_any_base_in_chunks(tmp_path, shape):
    base = build_shape(tmp_path / "base", shape)
    method = make_artifact(base, tmp_path / "artifact", "prefix", shape)
    attached = method.load(load_plain(base), tmp_path / "artifact")
    runner = ReferenceRunner(load_plain(base), num_blocks=16, max_sequences=4)
    # Chunks of eight tokens.
    runner.limits = replace(runner.limits, max_logit_rows=8)
    executor, source = BatchExecutor(runner), AdapterSource(tmp_path / "artifact", None)
    model = Model(runner.add_adapter(source), source, tmp_path / "artifact")
    plain, scored = ask(model, [5, 6, 7], 4, None), ask(model, [20 + i % 60 for i in range(31)], 4, 2)
    run(executor, plain, scored)
    prompt = scored.sequence.prompt_ids
    with torch.inference_mode():
        expected_TV = method.logits(attached, torch.tensor([prompt]))[0]
    check_scores(scored.events[0], prompt, expected_TV, 2)
    assert not any(isinstance(event, PromptScored) for event in plain.events)
    assert isinstance(plain.events[-1], Finish) and isinstance(scored.events[-1], Finish)
