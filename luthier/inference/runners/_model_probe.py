"""What one forward pass shows of a transformers model, and why some can't be run by the paged runner."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from luthier.inference.runners._paged_attention import CURRENT, NAME, AttentionOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NUM_TOKENS = 5
# Rotary frequencies that depend on the longest sequence of a pass.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}


@dataclass
class ModelProbe:
    """Attention layers with the shapes (heads, size) of their keys and values, and linear layers by path.

    A linear layer that sees a part of the tokens, as an expert does, is left out.
    """

    layers: list[tuple[nn.Module, torch.Size, torch.Size]] = field(default_factory=list)
    windows: list[int | None] = field(default_factory=list)
    linears: dict[str, nn.Module] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    @property
    def token_bytes(self) -> int:
        """Memory of a token's keys and values in all layers."""
        return sum(shape.numel() for _, *pair in self.layers for shape in pair) * self.dtype.itemsize

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        options: AttentionOptions,
    ) -> torch.Tensor:
        """Record a layer; attention gives zeros."""
        sizes = (torch.Size((part.shape[1], part.shape[3])) for part in (key, value))
        self.layers.append((module, *sizes))
        self.windows.append(options.window)
        self.dtype = key.dtype
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


@torch.inference_mode()
def probe_model(model: "PreTrainedModel") -> ModelProbe:
    """Run a few tokens and record what the model calls."""
    probe = ModelProbe()

    def record(path: str) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], _output: Any) -> None:
            if args and args[0].numel() == _NUM_TOKENS * args[0].shape[-1]:
                probe.linears[path] = module

        return see

    linears = [found for found in model.named_modules() if isinstance(found[1], nn.Linear | Conv1D)]
    hooks = [module.register_forward_hook(record(path)) for path, module in linears]
    attention, token = model.config._attn_implementation, CURRENT.set(probe.attend)
    model.set_attn_implementation(NAME)
    ids_1T = torch.arange(_NUM_TOKENS, device=model.device)[None]
    try:
        model(input_ids=ids_1T, position_ids=ids_1T, use_cache=False, logits_to_keep=1)
    finally:
        model.set_attn_implementation(attention)
        CURRENT.reset(token)
        for hook in hooks:
            hook.remove()
    return probe


def reasons_against(model: "PreTrainedModel") -> Iterator[str]:
    """Yield in one sentence each why the paged runner can't run a model."""
    config = model.config.get_text_config()
    if config.is_encoder_decoder:
        yield "It has an encoder."
    if getattr(model, "_is_stateful", False):
        yield "It has recurrent layers, which keep no keys and values."
    if not model._supports_attention_backend:
        yield "Its attention is not computed through transformers' attention interface."
    if not {"position_ids", "logits_to_keep"} <= inspect.signature(model.forward).parameters.keys():
        yield "Its forward pass takes no positions, or computes the logits of all tokens only."
    kinds = list(getattr(config, "layer_types", None) or [])
    if getattr(config, "attention_chunk_size", None) or set(kinds) - {"full_attention", "sliding_attention"}:
        yield "It has layers of another kind than full and sliding attention."
    probe = probe_model(model)
    if len(probe.layers) != config.num_hidden_layers or len(set(probe.layers)) != len(probe.layers):
        yield "Not every layer has exactly one attention that uses transformers' attention interface."
    if not all(getattr(module, "is_causal", True) for module, *_ in probe.layers):
        yield "Its attention is not causal."
    if kinds and [kind == "sliding_attention" for kind in kinds] != [bool(one) for one in probe.windows]:
        yield "Its attention does not get the sliding windows of its layers."


def context_length(model: "PreTrainedModel") -> int | None:
    """Return the positions of a sequence; None where the configuration has no limit."""
    config = model.config.get_text_config()
    length: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    for one in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if length is not None and one.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            # A sequence beyond it would change the frequencies of all others in its batch.
            length = min(length, one.get("original_max_position_embeddings") or length)
    return length
