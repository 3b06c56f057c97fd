"""Chooses the runner of a model: the first that takes it and agrees with transformers."""

import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel

from luthier.core.plugins import load_entry_points
from luthier.inference.runners.paged import PagedProvider
from luthier.inference.runners.reference import ReferenceProvider
from luthier.modeling.protocols import (
    Budget,
    LoadedWeights,
    ModelRunner,
    RunnerProvider,
    ScheduledBatch,
    TokenChunk,
)

_LOG = logging.getLogger(__name__)

_GROUP = "luthier.runners"
# The norm of the gap between logits, relative to that of transformers' logits: below the first where both
# compute in float32; elsewhere rounding alone makes about 0.02.
_TOLERANCE, _ROUNDED_TOLERANCE = 1e-3, 0.1


def find_providers() -> Iterator[tuple[str, RunnerProvider]]:
    """Yield the providers in order of preference, with their names; `reference`, which takes all, is last."""
    for name, provider in load_entry_points(_GROUP):
        yield name, provider()
    yield "paged", PagedProvider()
    yield "reference", ReferenceProvider()


def choose_runner(
    load: Callable[[], PreTrainedModel], folder: Path, budget: Budget, text: Sequence[int]
) -> ModelRunner:
    """Load a model with the first runner that takes it.

    Args:
        load: reads the model from its files; called again for each runner that gives other logits than
            transformers.
        text: at least two tokens, whose logits are compared.
    """
    model: PreTrainedModel | None = None
    for name, provider in find_providers():
        if model is None:
            model = load()
        reason = provider.refusal(model)
        if reason is not None:
            _LOG.info("The runner %s does not take %s: %s", name, folder.name, reason)
            continue
        is_exact, expected_V = model.dtype is torch.float32, _reference_logits(model, text)
        runner = provider.load(LoadedWeights(model, folder), budget)
        # The runner may have used it up.
        model = None
        gap = float((_logits(runner, text) - expected_V).norm() / expected_V.norm())
        # A model whose own logits are not finite is refused when it is verified.
        if gap <= (_TOLERANCE if is_exact else _ROUNDED_TOLERANCE) or not bool(expected_V.isfinite().all()):
            _LOG.info("The runner %s serves %s in %s.", name, folder.name, runner.limits.dtype)
            return runner
        _LOG.error(
            "The runner %s does not agree with transformers on %s (logits %.2g apart) and does not serve it.",
            name,
            folder.name,
            gap,
        )
        runner.close()
    raise AssertionError("The reference runner takes every model.")


@torch.inference_mode()
def _reference_logits(model: PreTrainedModel, text: Sequence[int]) -> torch.Tensor:
    logits_1TV = model(input_ids=torch.tensor([list(text)], device=model.device), use_cache=False).logits
    last_V: torch.Tensor = logits_1TV[0, -1].float().cpu()
    return last_V


def _logits(runner: ModelRunner, text: Sequence[int]) -> torch.Tensor:
    """Return what a runner gives after a text whose last token runs in a batch of its own."""
    blocks = list(range(-(-len(text) // runner.limits.block_size)))
    first = len(text) - 1
    runner.execute(ScheduledBatch([TokenChunk(text[:first], 0, blocks, None, first)]))
    logits = runner.execute(ScheduledBatch([TokenChunk(text[first:], first, blocks, None, 0)]))
    logits_V = logits.rows([0])[0].cpu().clone()
    runner.discard_blocks(blocks)
    return logits_V
