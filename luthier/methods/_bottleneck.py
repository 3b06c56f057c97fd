"""Bottleneck layers in a base: their places, their computation, their files, and their parts for runners.

Imported inside functions alone: it needs torch. The artifact's configuration names the bottlenecks and the
modules that they act on, so that a loader needs no knowledge of architectures.

Shapes: ... any leading axes, D hidden size, M bottleneck width.
"""

import json
import math
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from luthier.core.errors import ArtifactCorruptError, InvalidValueError
from luthier.methods._peft import CONFIG_NAME, WEIGHTS_NAME
from luthier.methods.adapter import ADAPTER_TYPE
from luthier.methods.base import BottleneckPart

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

Placement = Literal["houlsby", "pfeiffer", "parallel"]

FORMAT_VERSION = 1

# Functions of torch.nn.functional.
ACTIVATIONS = ("gelu", "relu", "silu", "tanh")

# Names of a block's two halves in the architectures of transformers.
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_FEED_FORWARD = ("mlp", "feed_forward", "ffn")
# Norms on a half's result, before it joins the stream (Gemma 2 and 3, OLMo 2, GLM-4): by pairs, because
# `post_attention_layernorm` alone is the norm before the feed-forward half in Llama.
_POST_NORMS = (
    ("post_attention_layernorm", "post_feedforward_layernorm"),
    ("post_self_attn_layernorm", "post_mlp_layernorm"),
)
_PARTS = ("down.weight", "down.bias", "up.weight", "up.bias")


class Bottleneck(nn.Module):
    """`x + up(act(down(x)))`; or, in parallel, a module's result plus `up(act(down(its input)))`.

    Args:
        activation: one of `ACTIVATIONS`.
        placement: where it stands; "parallel" reads its module's input, the others its result.
    """

    def __init__(
        self, size: int, width: int, *, activation: str, placement: str, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.down = nn.Linear(size, width)
        self.up = nn.Linear(width, size)
        self.activation = activation
        self.placement = placement
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        # As LoRA's A: small against a normed input, no direction preferred.
        bound = 1.0 / math.sqrt(size)
        with torch.no_grad():
            self.down.weight.uniform_(-bound, bound)
            for tensor in (self.down.bias, self.up.weight, self.up.bias):
                tensor.zero_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the update of x[..., D] alone, in the bottleneck's own type."""
        middle = getattr(nn.functional, self.activation)(self.down(x.to(self.down.weight.dtype)))
        return self.dropout(self.up(middle))

    def act_on(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Change a module's result; a forward hook, and a method so that copies of a model keep their own."""
        is_tuple = isinstance(output, tuple)
        result = output[0] if is_tuple else output
        x = result
        if self.placement == "parallel":
            x = args[0] if args else kwargs["hidden_states"]
        changed = (result + self(x)).to(result.dtype)
        return (changed, *output[1:]) if is_tuple else changed

    def hook_on(self, module: nn.Module) -> "RemovableHandle":
        """Act on a module from now on, until the returned hook is removed."""
        return module.register_forward_hook(self.act_on, with_kwargs=True)


# The places of bottlenecks, in the model's order: its own name, and the path of the module that it acts on.
Sites = dict[str, str]


def find_sites(causal_lm: "PreTrainedModel", placement: str) -> Sites:
    """List where the bottlenecks of a placement go, block by block.

    Returns:
        The sites. After the attention and the feed-forward half (houlsby) or the latter (pfeiffer), on
        the half's result as it joins the stream; around the feed-forward module (parallel).

    Raises:
        InvalidValueError: when the base's blocks have no halves that are known by name.
    """
    path, blocks = _blocks(causal_lm)
    sites: Sites = {}
    for number, block in enumerate(blocks):
        prefix = f"{path}.{number}"
        attention, feed_forward = _child(block, _ATTENTION), _child(block, _FEED_FORWARD)
        if feed_forward is None or (attention is None and placement == "houlsby"):
            raise _unknown_blocks(prefix, block)
        if placement != "parallel":
            attention, feed_forward = _ends_of_halves(block, attention, feed_forward)
        if placement == "houlsby":
            sites[f"{prefix}.attention_bottleneck"] = f"{prefix}.{attention}"
        sites[f"{prefix}.feed_forward_bottleneck"] = f"{prefix}.{feed_forward}"
    return sites


def put_on(causal_lm: "PreTrainedModel", sites: Sites, bottlenecks: list[Bottleneck]) -> None:
    """Make bottlenecks part of a base: submodules of their blocks that act on their modules."""
    for (path, module), bottleneck in zip(sites.items(), bottlenecks, strict=True):
        owner, _, name = path.rpartition(".")
        causal_lm.get_submodule(owner).add_module(name, bottleneck)
        bottleneck.hook_on(causal_lm.get_submodule(module))


def _own(causal_lm: "PreTrainedModel") -> dict[str, Bottleneck]:
    return {name: module for name, module in causal_lm.named_modules() if isinstance(module, Bottleneck)}


def write_bottlenecks(causal_lm: "PreTrainedModel", folder: Path) -> list[str]:
    """Write the bottlenecks of a base, in the format of docs/adapter-format.md."""
    modules = _own(causal_lm)
    weights = {
        f"{name}.{part}": module.get_parameter(part).detach().cpu().contiguous()
        for name, module in modules.items()
        for part in _PARTS
    }
    first = next(iter(modules.values()))
    sites = find_sites(causal_lm, first.placement)
    config = {
        "adapter_type": ADAPTER_TYPE,
        "format_version": FORMAT_VERSION,
        "base_model_name_or_path": causal_lm.name_or_path,
        "activation": first.activation,
        "placement": first.placement,
        "bottleneck_dim": first.down.out_features,
        "hidden_size": first.down.in_features,
        "bottlenecks": [{"name": name, "module": module} for name, module in sites.items()],
    }
    save_file(dict(sorted(weights.items())), folder / WEIGHTS_NAME, metadata={"format": "pt"})
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return [WEIGHTS_NAME, CONFIG_NAME]


def read_bottlenecks(
    causal_lm: "PreTrainedModel", folder: Path
) -> tuple[Sites, list[Bottleneck], dict[str, Any]]:
    """Read an artifact's bottlenecks, frozen, on the base's device; the base is not changed.

    Returns:
        Their sites, they themselves in evaluation mode, and the configuration.

    Raises:
        ArtifactCorruptError: when files are missing or don't fit the base.
    """
    config, parts = read_config_and_parts(folder, causal_lm.config.get_text_config().hidden_size)
    sites = [(str(one["name"]), part.module) for one, part in zip(config["bottlenecks"], parts, strict=True)]
    try:
        known = find_sites(causal_lm, config["placement"])
    except InvalidValueError as error:
        raise ArtifactCorruptError("The adapter's files can't be read for this base.") from error
    if sites != list(known.items()):
        raise ArtifactCorruptError("The adapter's configuration does not fit this base.")
    bottlenecks = [_filled(part, config["placement"]) for part in parts]
    return known, [one.to(causal_lm.device).requires_grad_(False).eval() for one in bottlenecks], config


def read_config_and_parts(
    folder: Path, hidden_size: int
) -> tuple[dict[str, Any], tuple[BottleneckPart, ...]]:
    """Read an artifact's configuration and its bottlenecks, in that order (docs/adapter-format.md).

    Raises:
        ArtifactCorruptError: when the files can't be read or don't fit the base.
    """
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG_NAME).read_bytes())
        weights = load_file(folder / WEIGHTS_NAME)
        is_ours = (config["adapter_type"], config["format_version"]) == (ADAPTER_TYPE, FORMAT_VERSION)
        if not is_ours or config["activation"] not in ACTIVATIONS:
            raise ArtifactCorruptError("The adapter's configuration does not fit this base.")
        size = config["hidden_size"], config["bottleneck_dim"]
        parts = tuple(_read_part(one, size, config, weights) for one in config["bottlenecks"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ArtifactCorruptError("The adapter's files can't be read for this base.") from error
    if weights or size[0] != hidden_size or not parts:
        raise ArtifactCorruptError("The adapter holds other tensors than this base has places for.")
    return config, parts


def _read_part(
    one: dict[str, str], size: tuple[int, int], config: dict[str, Any], weights: dict[str, torch.Tensor]
) -> BottleneckPart:
    """Take the tensors of one bottleneck out of `weights`."""
    hidden, middle = size
    shapes = ((middle, hidden), (middle,), (hidden, middle), (hidden,))
    tensors = [weights.pop(f"{one['name']}.{part}") for part in _PARTS]
    for part, tensor, shape in zip(_PARTS, tensors, shapes, strict=True):
        if tensor.shape != shape or tensor.dtype != torch.float32:
            name = f"{one['name']}.{part}"
            raise ArtifactCorruptError(f"The adapter's tensor {name} has another shape or type.")
    down_MD, down_M, up_DM, up_D = tensors
    is_parallel = config["placement"] == "parallel"
    return BottleneckPart(str(one["module"]), down_MD, down_M, up_DM, up_D, config["activation"], is_parallel)


def take_bottlenecks(causal_lm: "PreTrainedModel", folder: Path) -> None:
    """Fill the bottlenecks of a base with an artifact's tensors.

    Raises:
        ArtifactCorruptError: when it holds others than these.
    """
    sites, saved, _ = read_bottlenecks(causal_lm, folder)
    own, found = _own(causal_lm), dict(zip(sites, saved, strict=True))
    if own.keys() != found.keys() or not all(_is_alike(own[name], found[name]) for name in own):
        raise ArtifactCorruptError("The artifact's bottlenecks are not those of this model.")
    with torch.no_grad():
        for name, part in product(own, _PARTS):
            own[name].get_parameter(part).copy_(found[name].get_parameter(part))


def _is_alike(one: Bottleneck, other: Bottleneck) -> bool:
    return (one.activation, one.placement, one.down.weight.shape) == (
        other.activation,
        other.placement,
        other.down.weight.shape,
    )


def _filled(read: BottleneckPart, placement: str) -> Bottleneck:
    """Return a module with the tensors of an artifact."""
    with torch.device("meta"):
        bottleneck = Bottleneck(*read.up_DM.shape, activation=read.activation, placement=placement)
    for part, tensor in zip(_PARTS, (read.down_MD, read.down_M, read.up_DM, read.up_D), strict=True):
        owner, _, attribute = part.partition(".")
        setattr(bottleneck.get_submodule(owner), attribute, nn.Parameter(tensor))
    return bottleneck


def _blocks(causal_lm: "PreTrainedModel") -> tuple[str, nn.ModuleList]:
    """Return the list of the base's blocks and its path."""
    number = causal_lm.config.get_text_config().num_hidden_layers
    for path, module in causal_lm.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return path, module
    raise InvalidValueError(
        f"Adapters need a list of blocks in the base, and {type(causal_lm).__name__} has none. Use lora.",
        param="tuning.type",
    )


def _child(block: nn.Module, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if isinstance(getattr(block, name, None), nn.Module)), None)


def _ends_of_halves(block: nn.Module, attention: str | None, feed_forward: str) -> tuple[str | None, str]:
    """Return what gives each half's result as it joins the stream: the half, or the norm after it."""
    for after_attention, after_feed_forward in _POST_NORMS:
        if hasattr(block, after_attention) and hasattr(block, after_feed_forward):
            return after_attention, after_feed_forward
    return attention, feed_forward


def _unknown_blocks(path: str, block: nn.Module) -> InvalidValueError:
    found = ", ".join(name for name, _ in block.named_children())
    return InvalidValueError(
        f"Adapters need an attention and a feed-forward module in every block, called "
        f"{' or '.join(_ATTENTION)} and {' or '.join(_FEED_FORWARD)}. {path} of this base has: {found}. "
        "Use lora.",
        param="tuning.type",
    )
