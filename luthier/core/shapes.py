"""The shape of a base, read from its files without torch: sizes, and the name and shape of every weight."""

import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from luthier.core.errors import BaseUnavailableError

_IN_A_BLOCK = re.compile(r"\.\d+\.")
_EMBEDDINGS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)\.weight$")
# GraniteMoE keeps all experts of a block in one weight, which it names after the block alone.
EXPERTS = re.compile(r"\.(experts|block_sparse_moe)\.")
# A router's weight is no linear layer in transformers.
_ROUTER = re.compile(r"\.(gate|router)$")
# Buffers that older libraries wrote among the weights.
_NO_WEIGHTS = re.compile(r"\.(inv_freq|attn\.(masked_)?bias)$")
_HEAD = "lm_head.weight"
# Architectures whose linear layers keep their weights as [inputs, outputs].
_TRANSPOSED = {"gpt2", "openai-gpt", "imagegpt"}


@dataclass(frozen=True, eq=False)
class Weight:
    """One tensor. Two names of the same weight share the object."""

    shape: tuple[int, ...]

    @property
    def num_numbers(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class BaseShape:
    """Sizes of a base; `weights` are by their path in the model, `head_size` is one attention head's."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocabulary_size: int
    is_transposed: bool
    is_llama: bool
    weights: dict[str, Weight]

    @property
    def num_parameters(self) -> int:
        """Numbers of all weights; one that has two names counts once."""
        return sum(weight.num_numbers for weight in set(self.weights.values()))

    @property
    def key_value_width(self) -> int:
        """Numbers of one token's key in one layer; its value has as many."""
        return self.num_kv_heads * self.head_size

    @cached_property
    def has_experts(self) -> bool:
        """Whether blocks are mixtures of experts, whose weights the model keeps outside of linear layers."""
        return any(EXPERTS.search(name) for name in self.weights)

    @cached_property
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """Module path to (inputs, outputs) of the linear layers in the blocks, in the files' order.

        Experts and their routers are left out, whatever their files call them: the model has no such layers.
        """
        found: dict[str, tuple[int, int]] = {}
        for name, weight in self.weights.items():
            path = name.removesuffix(".weight")
            if len(weight.shape) != 2 or path == name or not _IN_A_BLOCK.search(name):
                continue
            if self.has_experts and (EXPERTS.search(name) or _ROUTER.search(path)):
                continue
            first, second = weight.shape
            found[path] = (first, second) if self.is_transposed else (second, first)
        return found


def read_shape(folder: Path) -> BaseShape:
    """Read the shape of a fetched base from config.json and the headers of its safetensors files.

    Raises:
        BaseUnavailableError: when they can't be read.
    """
    try:
        config = json.loads((folder / "config.json").read_bytes())
        config = config.get("text_config") or config
        weights = {
            name: Weight(shape)
            for path in sorted(folder.glob("*.safetensors"))
            for name, shape in read_tensor_shapes(path).items()
            if not _NO_WEIGHTS.search(name)
        }
        return _shape(config, weights)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise BaseUnavailableError(
            f"The files of the base {folder.name} can't be read: {type(error).__name__}. Fetch it again."
        ) from error


def _shape(config: dict[str, Any], weights: dict[str, Weight]) -> BaseShape:
    hidden_size = config.get("hidden_size") or config["n_embd"]
    num_heads = config.get("num_attention_heads") or config["n_head"]
    embedding = next((weight for name, weight in weights.items() if _EMBEDDINGS.search(name)), None)
    # A head that is not stored is the embedding, whatever default the configuration leaves unsaid.
    if embedding is not None and config.get("tie_word_embeddings", _HEAD not in weights):
        weights = {**weights, _HEAD: embedding}
    return BaseShape(
        num_layers=config.get("num_hidden_layers") or config["n_layer"],
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_size=config.get("head_dim") or hidden_size // num_heads,
        vocabulary_size=config["vocab_size"],
        is_transposed=config.get("model_type") in _TRANSPOSED,
        is_llama=config.get("model_type") == "llama",
        weights=weights,
    )


def read_tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a safetensors file's tensors by name, from its header alone.

    Raises:
        OSError: when there is no such file or it can't be read.
        SafetensorError: when it is no whole file of that format.
    """
    with safe_open(path, framework="numpy") as stored:
        return {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
