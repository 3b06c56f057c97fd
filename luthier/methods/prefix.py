"""Prefix tuning: trained keys and values before every layer's own (Li & Liang 2021, arXiv 2101.00190).

The prefix has positions 0 and up, the sequence follows. Models lean on the first position of whatever
they read; a prefix takes that place, so one that starts as keys and values of a real text begins near the
base's own behaviour and a random one far from it. PEFT holds it: what is saved loads in PEFT. It does not
depend on the request, so an artifact serves as the cached start of a sequence.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator

from luthier.core.cost_model import MethodCost
from luthier.core.shapes import BaseShape
from luthier.core.specs import Auto, BaseFacts
from luthier.methods._peft import attach_peft
from luthier.methods._virtual import (
    InitText,
    NumVirtualTokens,
    VirtualTokenMethod,
    check_init_text,
    resolve_num_tokens,
)
from luthier.methods.base import Attached, MethodParams, ServedParts, Start, Workload, resolved

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

# Deviation of random starts: small, so that no random key draws the attention of every token.
_RANDOM_DEVIATION = 0.02
_LARGEST_AUTO_WIDTH = 512
# For few rows, the usual number, and many.
_AUTO_TOKENS = (16, 32, 64)


class PrefixParams(MethodParams):
    """The `tuning` object of a prefix-tuning job."""

    type: Literal["prefix"] = "prefix"
    num_virtual_tokens: NumVirtualTokens = Field(
        "auto", description="Keys and values put before each layer's own."
    )
    init: Literal["examples", "text", "zeros", "random"] = Field(
        "examples",
        description='What they start as: the keys and values of the training rows ("examples") or of '
        '`init_text` ("text"), zeros, or random numbers.',
    )
    init_text: InitText = Field(
        None, description='The text of init "text", repeated or cut to length.', validate_default=True
    )
    projection: bool = Field(
        False, description="Train them through a two-layer network, which is dropped on saving."
    )
    projection_dim: Annotated[int, Field(ge=1, le=8192)] | Auto | None = Field(
        "auto", description="Width of that network; null without one.", validate_default=True
    )

    _init_text_fits = field_validator("init_text")(check_init_text)

    @field_validator("projection_dim")
    @classmethod
    def _width_has_its_network(cls, value: int | str | None, info: ValidationInfo) -> int | str | None:
        if isinstance(value, int) and not info.data.get("projection", True):
            raise ValueError("It is the width of the projection; set projection to true or leave it out")
        return value


class Prefix(VirtualTokenMethod):
    """Trained keys and values before every layer's own, held by PEFT."""

    name: ClassVar[str] = "prefix"
    title: ClassVar[str] = "Prefix tuning: trained keys and values before every layer's own"
    Params: ClassVar[type[MethodParams]] = PrefixParams
    shaping_params: ClassVar[frozenset[str]] = frozenset({"num_virtual_tokens"})
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    most_auto_tokens: ClassVar[int] = max(_AUTO_TOKENS)

    def resolve(self, params: PrefixParams, workload: Workload) -> PrefixParams:
        """Replace every "auto".

        More rows carry more than a short prefix holds, and a longer one costs attention only: 16 tokens for
        fewer than 100 rows, 32 for fewer than 2,000, 64 for more, at most an eighth of the context. A
        projection is as wide as the model, at most 512, the width of the paper.

        Raises:
            InvalidValueError: when the virtual tokens fill the whole context.
        """
        few, usual, many = _AUTO_TOKENS
        wanted = few if workload.num_rows < 100 else usual if workload.num_rows < 2000 else many
        num_tokens = resolve_num_tokens(params, workload, wanted)
        width = params.projection_dim if params.projection else None
        if params.projection and not isinstance(width, int):
            width = min(workload.base.hidden_size, _LARGEST_AUTO_WIDTH)
        return params.model_copy(update={"num_virtual_tokens": num_tokens, "projection_dim": width})

    def base_learning_rate(self, params: PrefixParams, *, base: BaseFacts) -> float:
        """Return the peak rate: keys and values have sizes about 1 and want large steps, a network small."""
        if params.projection:
            return 1e-3 if base.hidden_size <= 1024 else 5e-4
        return 1e-2 if base.hidden_size <= 1024 else 5e-3

    def cost(self, params: PrefixParams, shape: BaseShape) -> MethodCost:
        """Return `2·L·n·kv`; every token attends to the virtual keys.

        With a projection of width p its embedding and its two layers are trained instead:
        `n·kv + (kv + 1)·p + (p + 1)·2·L·kv`.
        """
        num_tokens, kv = resolved(params.num_virtual_tokens), shape.key_value_width
        count = num_saved = 2 * shape.num_layers * num_tokens * kv
        if params.projection:
            width = resolved(params.projection_dim)
            count = num_tokens * kv + (kv + 1) * width + (width + 1) * 2 * shape.num_layers * kv
        return MethodCost(num_parameters=count, num_saved=num_saved, num_virtual_keys=num_tokens)

    def attach(self, causal_lm: "PreTrainedModel", params: PrefixParams, start: Start) -> Attached:
        """Put PEFT's encoder beside the base, with its first values as `init` says."""
        import torch
        from peft import PrefixTuningConfig

        from luthier.methods._virtual_tensors import ADAPTER, KeyValueShape, ProjectedPrefix, check_base

        num_tokens = resolved(params.num_virtual_tokens)
        check_base(causal_lm, num_tokens)
        torch.manual_seed(start.seed)
        start_NF = _first_values(causal_lm, params, start)
        shape = KeyValueShape.of(causal_lm)
        config = PrefixTuningConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=start.base_id,
            num_virtual_tokens=num_tokens,
            num_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            token_dim=shape.width,
        )
        attached = attach_peft(causal_lm, config)
        encoders = attached.model.prompt_encoder
        if params.projection:
            config.prefix_projection = True
            config.encoder_hidden_size = resolved(params.projection_dim)
            torch.manual_seed(start.seed)
            # A random start with a projection is the network's own, as PEFT draws it.
            projected = ProjectedPrefix(config, None if params.init == "random" else start_NF)
            encoders[ADAPTER] = projected.to(device=causal_lm.device, dtype=torch.float32)
        else:
            with torch.no_grad():
                encoders[ADAPTER].embedding.weight.copy_(start_NF)
        return attached

    def save(self, attached: Attached, folder: Path) -> list[str]:
        """Write the keys and values in PEFT's two files; a projection is dropped."""
        from luthier.methods._virtual_tensors import save_encoded

        return save_encoded(attached, folder, prefix_projection=False, encoder_hidden_size=None)

    def read_parts(self, folder: Path, shape: BaseShape) -> ServedParts | None:
        from luthier.methods._virtual_tensors import KeyValueShape, read_vectors, unpack

        kept = KeyValueShape.of_shape(shape)
        saved_NF = read_vectors(folder, 2 * kept.num_layers * kept.width)
        return ServedParts(key_values=tuple(unpack(saved_NF, kept)))

    def hidden_states(self, attached: Attached, token_ids_BT: "torch.Tensor") -> "torch.Tensor":
        """Run the layers after the prefix as PEFT does."""
        from luthier.methods._virtual_tensors import cache_argument, check_length

        check_length(attached, token_ids_BT)
        body = attached.causal_lm.base_model
        cache = {cache_argument(body): attached.model.get_prompt(token_ids_BT.shape[0])}
        return body(input_ids=token_ids_BT, use_cache=False, **cache).last_hidden_state

    def virtual_key_values(self, attached: Attached) -> "list[tuple[torch.Tensor, torch.Tensor]]":
        """Return the prefix, a pair a layer in the base's type, each [key/value heads, n, head size]."""
        from luthier.methods._virtual_tensors import KeyValueShape, encoded, unpack

        flat_NF = encoded(attached).to(attached.causal_lm.dtype)
        return unpack(flat_NF, KeyValueShape.of(attached.causal_lm))


def _first_values(causal_lm: "PreTrainedModel", params: PrefixParams, start: Start) -> "torch.Tensor":
    """Return float32 [virtual tokens, 2 · layers · kv] on the base's device."""
    import torch

    from luthier.methods import _virtual_tensors as tensors

    num_tokens = resolved(params.num_virtual_tokens)
    if params.init == "text":
        token_ids = tensors.text_token_ids(start, params.init_text or "", num_tokens)
    elif params.init == "examples":
        token_ids = tensors.example_token_ids(start, num_tokens)
    else:
        token_ids = [0] * num_tokens
    # Even a start that needs no real ones runs the base once: that shows whether a prefix fits it at all.
    ids_1N = torch.tensor([token_ids], device=causal_lm.device)
    key_values = tensors.run_for_key_values(causal_lm, input_ids=ids_1N)
    tensors.check_fits(key_values, tensors.KeyValueShape.of(causal_lm))
    real_NF = tensors.pack(key_values)
    if params.init == "zeros":
        return torch.zeros_like(real_NF)
    if params.init == "random":
        # Drawn on the CPU, so that the device does not decide the numbers.
        return (torch.randn(real_NF.shape) * _RANDOM_DEVIATION).to(real_NF.device)
    return real_NF


METHOD = Prefix()
