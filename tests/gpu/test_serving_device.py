"""Serving on each device: every runner answers as transformers does, by blocks that it does not share."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from luthier.core.shapes import read_shape
from luthier.inference.runners.paged import PagedRunner
from luthier.inference.runners.reference import ReferenceRunner
from luthier.methods import method_of_artifact
from luthier.methods._tuning import parse_tuning
from luthier.methods.base import Start
from luthier.modeling.load import load_base
from luthier.modeling.protocols import AdapterId, AdapterSource, ModelRunner, ScheduledBatch, TokenChunk

_NUM_BLOCKS, _NUM_NEW = 32, 8
_PROMPTS = ([5, 17, 9, 30, 8], [12, 7], [21] * 19)
# Logits this close may change places in another order of sums.
_TIE = 1e-4
RUNNERS: dict[str, Callable[[object], ModelRunner]] = {
    "reference": lambda model: ReferenceRunner(model, num_blocks=_NUM_BLOCKS, max_sequences=4),
    "paged": lambda model: PagedRunner(model, max_cache_tokens=16 * _NUM_BLOCKS, max_sequences=4),
}


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> AdapterSource:
    folder = tmp_path_factory.mktemp("adapter")
    tuning = {"type": "lora", "rank": 4, "alpha": 8, "dropout": 0.0, "target_modules": "all-linear"}
    method, params = parse_tuning(tuning)
    model = load_base(base, dtype=torch.float32, device="cpu")
    attached = method.attach(model, params, Start(3, "tiny-llama", lambda _text: [1]))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, value in attached.named_trained_parameters():
            value.add_(torch.randn(value.shape, generator=generator) * 0.1)
    method.save(attached, folder)
    return AdapterSource(folder, method.read_parts(folder, read_shape(base)))


def stream(
    runner: ModelRunner, prompts: list[list[int]], adapters: list[AdapterId | None]
) -> list[torch.Tensor]:
    """Decode greedily and return the logits of each sequence's steps, [_NUM_NEW, V]."""
    size = runner.limits.block_size
    num_blocks = _NUM_BLOCKS // len(prompts)
    tables = [range(number * num_blocks, (number + 1) * num_blocks) for number in range(len(prompts))]
    assert num_blocks * size >= max(map(len, prompts)) + _NUM_NEW
    waiting, positions = [list(prompt) for prompt in prompts], [0] * len(prompts)
    found: list[list[torch.Tensor]] = [[] for _ in prompts]
    for _ in range(_NUM_NEW):
        chunks = [
            TokenChunk(tokens, position, table, adapter, len(tokens) - 1)
            for tokens, position, table, adapter in zip(waiting, positions, tables, adapters, strict=True)
        ]
        logits = runner.execute(ScheduledBatch(chunks))
        rows = logits.rows(range(len(chunks))).float().cpu()
        positions = [position + len(tokens) for position, tokens in zip(positions, waiting, strict=True)]
        waiting = [[token] for token in logits.greedy()]
        for one, row in zip(found, rows, strict=True):
            one.append(row.clone())
    return [torch.stack(one) for one in found]


def assert_alike(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Compare steps up to the first whose two likeliest tokens are as good as equal."""
    for one, other in zip(found, expected, strict=True):
        for ours_V, theirs_V in zip(one, other, strict=True):
            torch.testing.assert_close(ours_V, theirs_V, rtol=1e-3, atol=1e-3)
            first, second = theirs_V.topk(2).values.tolist()
            if first - second < _TIE:
                break


@torch.no_grad()
def by_transformers(base: Path, prompt: list[int], source: AdapterSource | None = None) -> torch.Tensor:
    """Decode one prompt on the CPU, every step from the start; return the logits of the steps."""
    model = load_base(base, dtype=torch.float32, device="cpu")
    method = attached = None
    if source is not None:
        method = method_of_artifact(source.folder)
        attached = method.load(model, source.folder)
    ids, found = list(prompt), []
    for _ in range(_NUM_NEW):
        ids_1T = torch.tensor([ids])
        logits = model(input_ids=ids_1T).logits if method is None else method.logits(attached, ids_1T)
        found.append(logits[0, -1])
        ids.append(int(found[-1].argmax()))
    return torch.stack(found)


@pytest.mark.parametrize("name", RUNNERS)
def test_sequences_answer_together_as_each_does_alone(device: str, name: str, base: Path) -> None:
    runner = RUNNERS[name](load_base(base, dtype=torch.float32, device=device))
    prompts = [list(prompt) for prompt in _PROMPTS]
    found = stream(runner, prompts, [None] * len(prompts))
    assert_alike(found, [by_transformers(base, prompt) for prompt in prompts])


@pytest.mark.parametrize("name", RUNNERS)
def test_an_adapter_answers_as_its_method_does_and_leaves_the_base_as_it_was(
    device: str, name: str, base: Path, adapter: AdapterSource
) -> None:
    runner = RUNNERS[name](load_base(base, dtype=torch.float32, device=device))
    prompt = list(_PROMPTS[0])
    before = stream(runner, [prompt], [None])
    held = runner.add_adapter(runner.prepare_adapter(adapter)).adapter
    [tuned] = stream(runner, [prompt], [held])
    assert_alike([tuned], [by_transformers(base, prompt, adapter)])
    assert not torch.allclose(tuned[0], before[0][0], atol=1e-2)
    runner.remove_adapter(held)
    assert_alike(stream(runner, [prompt], [None]), before)


def test_the_base_and_an_adapter_answer_in_one_batch_as_each_does_alone(
    device: str, base: Path, adapter: AdapterSource
) -> None:
    runner = RUNNERS["paged"](load_base(base, dtype=torch.float32, device=device))
    held = runner.add_adapter(adapter).adapter
    prompts, adapters = [list(prompt) for prompt in _PROMPTS], [held, None, held]
    expected = [
        by_transformers(base, prompt, None if one is None else adapter)
        for prompt, one in zip(prompts, adapters, strict=True)
    ]
    assert_alike(stream(runner, prompts, adapters), expected)


@pytest.mark.parametrize("name", RUNNERS)
def test_drawn_tokens_are_the_engines_or_likely_ones(device: str, name: str, base: Path) -> None:
    runner = RUNNERS[name](load_base(base, dtype=torch.float32, device=device))
    logits = runner.execute(ScheduledBatch([TokenChunk(list(_PROMPTS[0]), 0, range(4), None, 4)]))
    likeliest = int(logits.rows([0])[0].argmax())
    [drawn] = logits.draw([0], temperatures=[1e-3], top_p=[1.0], points=[0.5])
    assert drawn in (None, likeliest)
