"""Forward passes of any causal language model over a cache that may begin with virtual tokens.

Prompts are padded on the right: causal, so no real token sees the padding, and a prefix stays next to the
text, which a window of attention and learned positions both need.

Legend: `B` rows, `T` tokens of this pass, `W` cached tokens with those of this pass, `V` vocabulary.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

# Keys and values of every layer, each [key/value heads, virtual tokens, head size].
Prefix = Sequence[tuple[torch.Tensor, torch.Tensor]]

# Rows of logits that are shown at a time; one has as many numbers as the vocabulary has tokens.
MAX_SHOWN_LOGITS = 256


def count_virtual_tokens(prefix: Prefix) -> int:
    """Return how many virtual tokens a prefix has."""
    return prefix[0][0].shape[1] if prefix else 0


def forward(
    model: PreTrainedModel,
    past: DynamicCache,
    ids_BT: torch.Tensor,
    mask_BW: torch.Tensor,
    positions_BT: torch.Tensor,
) -> torch.Tensor:
    """Run tokens after those that a cache holds; the cache grows by them.

    Args:
        past: keys and values of W - T tokens.
        ids_BT: int64 token ids.
        mask_BW: int64, 1 where a token is real.
        positions_BT: int64 positions of the T tokens.

    Returns:
        logits_BTV in the model's type.
    """
    takes_positions, cache_argument = _wishes(type(model).forward)
    arguments: dict[str, Any] = {
        "input_ids": ids_BT,
        "attention_mask": mask_BW,
        "use_cache": True,
        cache_argument: past,
    }
    if takes_positions:
        arguments["position_ids"] = positions_BT
    logits_BTV: torch.Tensor = model(**arguments).logits
    return logits_BTV


def run_prompts(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], prefix: Prefix
) -> tuple[DynamicCache, torch.Tensor]:
    """Run whole prompts, each after the same prefix.

    Args:
        prompts: token ids of B prompts, T in the longest.
        prefix: what lies before each; empty for nothing.

    Returns:
        The cache, its rows padded on the right, and the logits of the token after each prompt,
        float32 [B, V].
    """
    device, num_virtual = model.device, count_virtual_tokens(prefix)
    ids_BT = _pad_right(prompts)
    longest = ids_BT.shape[1]
    last_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    # The padding counts as real: it comes after all that is looked at, and a full mask is a cheaper one.
    mask_BW = torch.ones(len(prompts), num_virtual + longest, dtype=torch.long, device=device)
    positions_1T = torch.arange(num_virtual, num_virtual + longest, device=device).unsqueeze(0)
    past = _begin(prefix, len(prompts))
    with _only_last(model, last_B):
        logits_B1V = forward(model, past, ids_BT.to(device), mask_BW, positions_1T.expand(len(prompts), -1))
    return past, logits_B1V[:, -1].float()


def run_prompts_whole(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    prefix: Prefix,
    see: Callable[[int, torch.Tensor], None],
) -> tuple[DynamicCache, torch.Tensor]:
    """Run whole prompts as `run_prompts` does, and show the logits of all their tokens.

    They are run in stretches, so that the logits of only a few tokens are in memory at a time.

    Args:
        prompts: token ids of B prompts.
        prefix: what lies before each; empty for nothing.
        see: takes the place of a stretch's first token in the prompts and logits_BTV, float32, in order;
            what lies beyond a prompt's end means nothing.

    Returns:
        As `run_prompts`.
    """
    device, num_virtual = model.device, count_virtual_tokens(prefix)
    ids_BT = _pad_right(prompts).to(device)
    num_rows, longest = ids_BT.shape
    size = max(1, MAX_SHOWN_LOGITS // num_rows)
    past, ends = _begin(prefix, num_rows), [torch.empty(0)] * num_rows
    for first in range(0, longest, size):
        part_BT = ids_BT[:, first : first + size]
        end = first + part_BT.shape[1]
        mask_BW = torch.ones(num_rows, num_virtual + end, dtype=torch.long, device=device)
        positions_1T = torch.arange(num_virtual + first, num_virtual + end, device=device).unsqueeze(0)
        logits_BTV = forward(model, past, part_BT, mask_BW, positions_1T.expand(num_rows, -1)).float()
        see(first, logits_BTV)
        for row, prompt in enumerate(prompts):
            if first < len(prompt) <= end:
                ends[row] = logits_BTV[row, len(prompt) - 1 - first].clone()
    return past, torch.stack(ends)


def _pad_right(prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    ids_BT = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids_BT[row, : len(prompt)] = torch.tensor(prompt)
    return ids_BT


def _begin(prefix: Prefix, num_rows: int) -> DynamicCache:
    past = DynamicCache()
    for layer, (keys, values) in enumerate(prefix):
        past.update(keys.expand(num_rows, -1, -1, -1), values.expand(num_rows, -1, -1, -1), layer)
    return past


@contextlib.contextmanager
def _only_last(model: PreTrainedModel, last_B: torch.Tensor) -> Iterator[None]:
    """Let the output layer see each row's last real position alone; all others' logits would be wasted."""
    rows_B = torch.arange(len(last_B), device=last_B.device)

    def narrow(_head: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0][rows_B, last_B].unsqueeze(1), *inputs[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        hook.remove()


@cache
def _wishes(method: Callable[..., Any]) -> tuple[bool, str]:
    """Return whether a model takes positions, and its name for the cache, which transformers changed."""
    arguments = inspect.signature(method).parameters
    return "position_ids" in arguments, "cache" if "cache" in arguments else "past_key_values"
