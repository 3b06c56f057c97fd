"""Tensors of prefix and prompt tuning. Imported inside functions alone: it needs torch.

Shapes: N virtual tokens, L layers, H key/value heads, C head size, D hidden size, F = 2·L·H·C, the key
and value of every layer of one virtual token: layer by layer, the key before the value, as PEFT stores them.
"""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.prefix_tuning import PrefixEncoder
from safetensors import SafetensorError
from safetensors.torch import load_file

from luthier.core.errors import ArtifactCorruptError, InvalidValueError
from luthier.core.shapes import BaseShape
from luthier.methods._peft import WEIGHTS_NAME, write_adapter
from luthier.methods.base import Attached, Start, check_room

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KeyValues = list[tuple[torch.Tensor, torch.Tensor]]

# PEFT's names for the tensor of a saved adapter and for an adapter that was given none.
SAVED_NAME = "prompt_embeddings"
ADAPTER = "default"


@dataclass(frozen=True)
class KeyValueShape:
    """How a base keeps keys and values: the same number of heads and head size in every layer."""

    num_layers: int
    num_heads: int
    head_size: int

    @property
    def width(self) -> int:
        """Numbers of one token's key in one layer; its value has as many."""
        return self.num_heads * self.head_size

    @classmethod
    def of(cls, causal_lm: "PreTrainedModel") -> "KeyValueShape":
        config = causal_lm.config.get_text_config()
        num_query_heads = config.num_attention_heads
        return cls(
            num_layers=config.num_hidden_layers,
            num_heads=getattr(config, "num_key_value_heads", None) or num_query_heads,
            head_size=getattr(config, "head_dim", None) or config.hidden_size // num_query_heads,
        )

    @classmethod
    def of_shape(cls, shape: BaseShape) -> "KeyValueShape":
        """Return that of a base which is not in memory."""
        return cls(num_layers=shape.num_layers, num_heads=shape.num_kv_heads, head_size=shape.head_size)


class ProjectedPrefix(PrefixEncoder):
    """A prefix that is trained through a two-layer network (Li & Liang 2021, section 4.3).

    The network's result is added to `start_NF`, so that a projected prefix may begin at real keys and values.
    Without `start_NF` the prefix begins at the network's own result, as PEFT draws it.
    """

    def __init__(self, config: Any, start_NF: torch.Tensor | None) -> None:
        super().__init__(config)
        zeros_NF = torch.zeros(config.num_virtual_tokens, self.transform[-1].out_features)
        self.register_buffer("start_NF", zeros_NF, persistent=False)
        if start_NF is not None:
            self.begin_at(start_NF)

    @torch.no_grad()
    def begin_at(self, start_NF: torch.Tensor) -> None:
        """Make the network's result zero and `start_NF` what it is added to."""
        last = self.transform[-1]
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
        self.start_NF = start_NF.to(last.weight.device)

    def forward(self, prefix: torch.Tensor) -> torch.Tensor:
        """Return the prefix for a batch; it is the same for every row, so it is computed once."""
        prefix_1NF = super().forward(prefix[:1]) + self.start_NF
        return prefix_1NF.expand(prefix.shape[0], -1, -1)


def check_base(causal_lm: "PreTrainedModel", num_virtual_tokens: int) -> None:
    """Refuse a base that nothing can be put before, or that has no position beside the virtual tokens.

    The past of recurrent layers is no list of keys and values to begin from.
    """
    if getattr(causal_lm, "_is_stateful", False):
        raise _unsuitable("has recurrent layers, which keep no keys and values")
    limit = getattr(causal_lm.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None:
        check_room(num_virtual_tokens, limit)


def check_length(attached: Attached, token_ids_BT: torch.Tensor) -> None:
    """Refuse rows that, with the virtual tokens before them, are longer than the base's context.

    Learned positions would end there, and rotary ones continue silently into what the base never saw.

    Raises:
        InvalidValueError: when they are too long.
    """
    limit = getattr(attached.causal_lm.config.get_text_config(), "max_position_embeddings", None)
    num_virtual_tokens = attached.model.peft_config[ADAPTER].num_virtual_tokens
    num_tokens = token_ids_BT.shape[1]
    if limit is not None and num_virtual_tokens + num_tokens > limit:
        raise InvalidValueError(
            f"{num_virtual_tokens} virtual tokens and a row of {num_tokens} tokens are more than the {limit} "
            f"positions of this base. Use fewer, or set training.max_length to {limit - num_virtual_tokens}.",
            param="tuning.num_virtual_tokens",
        )


def text_token_ids(start: Start, text: str, num_tokens: int) -> list[int]:
    """Return the token ids of a text, repeated or cut to a number of tokens."""
    token_ids = start.tokenize(text)
    if not token_ids:
        raise InvalidValueError(
            "init_text holds no token of this base. Write a few words.", param="tuning.init_text"
        )
    return _fit(token_ids, num_tokens)


def example_token_ids(start: Start, num_tokens: int) -> list[int]:
    """Return the first token ids of the training rows, one row after the other, repeated where too few."""
    token_ids: list[int] = []
    for example in start.examples:
        token_ids.extend(int(token) for token in example)
        if len(token_ids) >= num_tokens:
            break
    if not token_ids:
        raise InvalidValueError(
            'init "examples" needs training rows to begin from. Use "text" or "zeros".', param="tuning.init"
        )
    return _fit(token_ids, num_tokens)


def _fit(token_ids: list[int], num_tokens: int) -> list[int]:
    num_repeats = -(-num_tokens // len(token_ids))
    return (list(token_ids) * num_repeats)[:num_tokens]


def cache_argument(body: torch.nn.Module) -> str:
    """Return how a model calls the keys and values that it is given: transformers changed the name."""
    return "cache" if "cache" in inspect.signature(body.forward).parameters else "past_key_values"


@torch.no_grad()
def run_for_key_values(causal_lm: "PreTrainedModel", **inputs: torch.Tensor) -> KeyValues:
    """Run the base over `input_ids` [1, N] or `inputs_embeds` [1, N, D] and return its keys and values.

    A pair a layer, each [H, N, C] in the base's type, positions 0 to N - 1.
    """
    from transformers import DynamicCache

    body = causal_lm.base_model
    cache = DynamicCache()
    was_training = body.training
    body.eval()
    try:
        body(**inputs, use_cache=True, **{cache_argument(body): cache})
    finally:
        body.train(was_training)
    return [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def check_fits(key_values: KeyValues, shape: KeyValueShape) -> None:
    """Refuse a base whose layers don't all keep keys and values of the shape that PEFT will give them."""
    num_tokens = key_values[0][0].shape[1]
    expected = (shape.num_heads, num_tokens, shape.head_size)
    parts = [part for pair in key_values for part in pair]
    if len(key_values) != shape.num_layers or any(part.shape != expected for part in parts):
        raise _unsuitable("keeps keys and values of more than one shape")


def _unsuitable(reason: str) -> InvalidValueError:
    return InvalidValueError(
        f"This base {reason}: nothing can be put before its tokens. Use lora.", param="tuning.type"
    )


def pack(key_values: KeyValues) -> torch.Tensor:
    """Return keys and values as PEFT stores them: float32 [N, F]."""
    parts = [part.transpose(0, 1) for pair in key_values for part in pair]
    return torch.stack(parts, dim=1).flatten(1).float()


def unpack(flat_NF: torch.Tensor, shape: KeyValueShape) -> KeyValues:
    """Return what PEFT stores as a pair a layer, each [H, N, C]; differentiable."""
    parts = flat_NF.unflatten(1, (2 * shape.num_layers, shape.num_heads, shape.head_size))
    layers = parts.permute(1, 2, 0, 3)
    return [(layers[2 * i], layers[2 * i + 1]) for i in range(shape.num_layers)]


def encoded(attached: Attached) -> torch.Tensor:
    """Return what PEFT's encoder gives, float32 [N, F] for a prefix and [N, D] for a prompt."""
    encoder = attached.model.prompt_encoder[ADAPTER]
    tokens = attached.model.prompt_tokens[ADAPTER].to(encoder.embedding.weight.device)
    return encoder(tokens[None])[0]


def save_encoded(attached: Attached, folder: Path, **changes: Any) -> list[str]:
    """Write the vectors and PEFT's configuration, some of its members changed."""
    with torch.no_grad():
        weights = {SAVED_NAME: encoded(attached).clone()}
    config = attached.model.peft_config[ADAPTER].to_dict()
    return write_adapter(folder, weights, config | changes)


def take_encoded(attached: Attached, folder: Path) -> None:
    with torch.no_grad():
        num_tokens, width = encoded(attached).shape
    saved_NF = read_vectors(folder, width)
    if len(saved_NF) != num_tokens:
        raise ArtifactCorruptError("The artifact has another number of virtual tokens than this model.")
    encoder = attached.model.prompt_encoder[ADAPTER]
    if isinstance(encoder, ProjectedPrefix):
        encoder.begin_at(saved_NF.float())
        return
    with torch.no_grad():
        encoder.embedding.weight.copy_(saved_NF)


def read_vectors(folder: Path, width: int) -> torch.Tensor:
    """Read the vectors of an artifact, [N, width].

    Raises:
        ArtifactCorruptError: when the file can't be read or holds anything else.
    """
    try:
        tensors = load_file(folder / WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise ArtifactCorruptError("The artifact's weights can't be read.") from error
    vectors = tensors.pop(SAVED_NAME, None)
    if tensors or vectors is None or vectors.ndim != 2 or vectors.shape[1] != width or not len(vectors):
        raise ArtifactCorruptError("The artifact's virtual tokens don't fit this base.")
    return vectors
