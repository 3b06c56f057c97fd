"""The reference runner: every method on every shape answers as it does alone, whatever the scheduler does."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from luthier.core.errors import ArtifactCorruptError
from luthier.inference.engine.scheduler import Scheduler
from luthier.inference.engine.sequence import Choice, Finish
from luthier.inference.engine.step import BatchExecutor
from luthier.inference.runners.reference import ReferenceRunner
from luthier.methods import discover
from luthier.modeling.protocols import AdapterInfo, AdapterSource, ScheduledBatch, TokenChunk
from tests.tiny_shapes import SHAPES, build_shape
from tests.unit.inference.artifacts import load_plain, make_artifact
from tests.unit.inference.sequences import Asked, ask, run

# One is longer than the sliding windows of the shapes, one as short as can be; two begin alike.
PROMPTS = [[5, 6, 7], [20 + i % 60 for i in range(31)], [9], [20 + i % 60 for i in range(40)]]
NUM_TOKENS = 20
METHODS = [name for name, method in discover().items() if not method.is_whole_model]


def expected_of(method: Any, attached: Any, prompt: list[int]) -> list[Choice]:
    """Return the likeliest tokens one by one, each from a forward pass over all before it."""
    history, choices = list(prompt), []
    with torch.inference_mode():
        for _ in range(NUM_TOKENS):
            ids_1T = torch.tensor([history])
            logits_1TV = attached(ids_1T).logits if method is None else method.logits(attached, ids_1T)
            value, token = torch.log_softmax(logits_1TV[0, -1], dim=-1).max(dim=-1)
            choices.append(Choice(int(token), float(value)))
            history.append(int(token))
    return choices


@pytest.mark.parametrize("shape", list(SHAPES))
def test_every_method_answers_as_it_does_alone(tmp_path, shape, monkeypatch):
    torch.set_num_threads(1)
    base = build_shape(tmp_path / "base", shape)
    # Few blocks, so that sequences are preempted.
    executor = BatchExecutor(ReferenceRunner(load_plain(base), num_blocks=8, max_sequences=4))
    models: list[tuple[AdapterInfo | None, list[list[Choice]]]] = [
        (None, [expected_of(None, load_plain(base), prompt) for prompt in PROMPTS])
    ]
    for name in METHODS:
        method = make_artifact(base, tmp_path / name, name, shape)
        attached = method.load(load_plain(base), tmp_path / name)
        info = executor.runner.add_adapter(AdapterSource(tmp_path / name, None))
        models.append((info, [expected_of(method, attached, prompt) for prompt in PROMPTS]))
    preempted: list[object] = []
    preempt = Scheduler._preempt
    monkeypatch.setattr(Scheduler, "_preempt", lambda *given: (preempted.append(given), preempt(*given)))
    asked: list[tuple[list[Choice], Asked]] = []
    for place, prompt in enumerate(PROMPTS):
        for info, expected in models:
            one = ask(prompt, NUM_TOKENS, adapter=info, num_logprobs=0)
            executor.scheduler.add(one.sequence)
            asked.append((expected[place], one))
        executor.step()
    run(executor)
    for answer, one in asked:
        assert [choice.token_id for choice in one.choices] == [choice.token_id for choice in answer]
        logprobs = [choice.logprob for choice in answer]
        assert [choice.logprob for choice in one.choices] == pytest.approx(logprobs, abs=1e-4)
        assert isinstance(one.events[-1], Finish)
    assert preempted
    # The models differ at all, or equality with them says nothing.
    assert len({str(expected) for _, expected in models}) == len(models)
    assert executor.scheduler.pool.num_free == executor.scheduler.pool.num_blocks
    # Taken off, nothing of the adapters is left on the base.
    for info, _ in models[1:]:
        executor.runner.remove_adapter(info.adapter)
    chunk = TokenChunk(PROMPTS[1], 0, [0, 1], None, 0)
    found_TV = executor.runner.execute(ScheduledBatch([chunk])).rows(range(31))
    with torch.inference_mode():
        expected_TV = load_plain(base)(torch.tensor([PROMPTS[1]])).logits[0]
    assert torch.allclose(found_TV, expected_TV, atol=1e-5)


def test_an_artifact_of_another_shape_is_refused_and_leaves_the_base_as_it_was(tmp_path):
    base, other = build_shape(tmp_path / "base", "llama"), build_shape(tmp_path / "other", "gpt2")
    make_artifact(other, tmp_path / "artifact", "lora", "gpt2")
    runner = ReferenceRunner(load_plain(base), num_blocks=4, max_sequences=2)
    with pytest.raises(ArtifactCorruptError):
        runner.add_adapter(AdapterSource(tmp_path / "artifact", None))
    chunk = TokenChunk([5, 6], 0, [0], None, 1)
    [token] = runner.execute(ScheduledBatch([chunk])).greedy()
    with torch.inference_mode():
        assert token == int(load_plain(base)(torch.tensor([[5, 6]])).logits[0, -1].argmax())


@pytest.mark.parametrize("name", METHODS)
def test_tensors_that_do_not_fit_are_refused_and_leave_the_base_as_it_was(tmp_path, name):
    base, folder = build_shape(tmp_path / "base", "llama"), tmp_path / "artifact"
    make_artifact(base, folder, name, "llama")
    runner = ReferenceRunner(load_plain(base), num_blocks=4, max_sequences=2)
    asked = ScheduledBatch([TokenChunk([5, 6], 0, [0], None, 1)])
    before = runner.execute(asked).rows([0])
    path = folder / "adapter_model.safetensors"
    whole = load_file(path)
    for tensors in (
        {key: value[..., :-1].contiguous() for key, value in whole.items()},
        {f"{key}.other": value for key, value in whole.items()},
        dict(list(whole.items())[1:]),
        None,
    ):
        path.write_bytes(b"no tensors") if tensors is None else save_file(tensors, path)
        with pytest.raises(ArtifactCorruptError):
            runner.add_adapter(AdapterSource(folder, None))
        assert torch.equal(runner.execute(asked).rows([0]), before)
