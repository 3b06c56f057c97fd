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
        model: any causal language model.
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
        model: any causal language model.
        prompts: token ids of B prompts, T in the longest.
        prefix: what lies before each; empty for nothing.

    Returns:
        The cache, its rows padded on the right, and the logits of the token after each prompt,
        float32 [B, V].
    """
    device = model.device
    num_virtual, longest = count_virtual_tokens(prefix), max(map(len, prompts))
    ids_BT = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids_BT[row, : len(prompt)] = torch.tensor(prompt)
    last_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    # The padding counts as real: it comes after all that is looked at, and a full mask is a cheaper one.
    mask_BW = torch.ones(len(prompts), num_virtual + longest, dtype=torch.long, device=device)
    positions_1T = torch.arange(num_virtual, num_virtual + longest, device=device).unsqueeze(0)
    past = _begin(prefix, len(prompts))
    with _only_last(model, last_B):
        logits_B1V = forward(model, past, ids_BT.to(device), mask_BW, positions_1T.expand(len(prompts), -1))
    return past, logits_B1V[:, -1].float()


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
