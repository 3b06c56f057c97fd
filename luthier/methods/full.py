"""Full tuning: every weight is trained but those that `freeze` names.

The result is a whole model in the type that it was trained in, which transformers loads by itself. The
base's files are never touched; the base in memory becomes the result. Training in bf16 keeps float32
masters beside the weights (luthier.training.model), for an update is often smaller than a bf16 rounding.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, field_validator

from luthier.core.cost_model import MethodCost
from luthier.core.errors import ArtifactCorruptError, InvalidValueError
from luthier.core.shapes import BaseShape
from luthier.core.specs import BaseFacts
from luthier.methods._layers import Selection, check_pattern, match_paths
from luthier.methods._peft import CONFIG_NAME as ADAPTER_CONFIG_NAME
from luthier.methods.base import Attached, Method, MethodParams, Start, Workload

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_CONFIG_NAME = "config.json"
_WEIGHTS_NAME = "model.safetensors"
# What a folder needs beside weights and configuration to answer: training leaves it as the base has it.
_TAKEN_OVER = (
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
# Facts of this machine: a result's bytes must not depend on them.
_LOCAL_KEYS = ("_name_or_path", "name_or_path")


class FullParams(MethodParams):
    """The `tuning` object of a full tuning job."""

    type: Literal["full"] = "full"
    freeze: Selection | None = Field(
        None,
        description="What stays as it is: a list of names of modules or weights, or a regular expression for "
        "their whole path.",
    )

    _pattern_compiles = field_validator("freeze")(check_pattern)


class Full(Method):
    name: ClassVar[str] = "full"
    title: ClassVar[str] = "Full: every weight of the base"
    Params: ClassVar[type[MethodParams]] = FullParams
    # All weights are saved, whichever were trained.
    shaping_params: ClassVar[frozenset[str]] = frozenset()
    is_whole_model: ClassVar[bool] = True
    library_name: ClassVar[str | None] = "transformers"
    loading: ClassVar[str] = (
        "It is a whole model: load it with `transformers.AutoModelForCausalLM.from_pretrained(folder)`."
    )

    def resolve(self, params: FullParams, workload: Workload) -> FullParams:  # noqa: ARG002
        return params

    def base_learning_rate(self, params: FullParams, *, base: BaseFacts) -> float:  # noqa: ARG002
        return 5e-5 if base.hidden_size <= 2048 else 2e-5

    def cost(self, params: FullParams, shape: BaseShape) -> MethodCost:
        """Return the sizes of all weights but the frozen ones; tied weights count once."""
        frozen = _frozen(shape.weights, params.freeze)
        trained = {id(weight): weight for weight in shape.weights.values() if id(weight) not in frozen}
        return MethodCost(
            num_parameters=sum(weight.num_numbers for weight in trained.values()),
            num_saved=shape.num_parameters,
        )

    def attach(self, causal_lm: "PreTrainedModel", params: FullParams, start: Start) -> Attached:
        """Mark the base's weights as trained, in place; what is done to them is done to the base."""
        import torch

        frozen = _frozen(dict(causal_lm.named_parameters(remove_duplicate=False)), params.freeze)
        for weight in causal_lm.parameters():
            weight.requires_grad_(id(weight) not in frozen)
        # Nothing here is drawn, but a base with dropout draws in training.
        torch.manual_seed(start.seed)
        return Attached(model=causal_lm, causal_lm=causal_lm)

    def save(self, attached: Attached, folder: Path) -> list[str]:
        """Write weights and configuration, and copy what the base's folder has beside them."""
        from transformers import GenerationConfig
        from transformers.utils import logging

        causal_lm = attached.causal_lm
        logging.disable_progress_bar()
        # The library refuses to save some generation settings that bases come with; the base's file is taken
        # over as it is instead.
        generation, plain = causal_lm.generation_config, GenerationConfig.from_model_config(causal_lm.config)
        causal_lm.generation_config = plain
        try:
            causal_lm.save_pretrained(folder, max_shard_size=2**62)
        finally:
            causal_lm.generation_config = generation
        base = Path(causal_lm.name_or_path)
        for name in _TAKEN_OVER:
            if (base / name).is_file():
                shutil.copyfile(base / name, folder / name)
        _drop_local_facts(folder / _CONFIG_NAME)
        # The library writes weights for their owner alone.
        (folder / _WEIGHTS_NAME).chmod(0o644)
        written = (_CONFIG_NAME, _WEIGHTS_NAME, *_TAKEN_OVER)
        return sorted(name for name in written if (folder / name).is_file())

    def recognises(self, folder: Path) -> bool:
        has_adapter = (folder / ADAPTER_CONFIG_NAME).exists()
        return not has_adapter and all((folder / name).is_file() for name in (_CONFIG_NAME, _WEIGHTS_NAME))

    def load(self, causal_lm: "PreTrainedModel", folder: Path) -> Attached:
        """Load the folder's model on the device and in the type of the given one, which is not touched.

        Raises:
            ArtifactCorruptError: when the folder can't be read as a model or lacks weights.
        """
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=causal_lm.dtype,
                attn_implementation=causal_lm.config._attn_implementation,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise ArtifactCorruptError("The artifact can't be loaded as a model.") from error
        # The library fills absent weights with random numbers.
        if info["missing_keys"] or info["mismatched_keys"]:
            raise ArtifactCorruptError("The artifact lacks weights of its model.")
        model = model.to(causal_lm.device).requires_grad_(False).eval()
        return Attached(model=model, causal_lm=model)


def _frozen(weights: Mapping[str, Any], freeze: str | list[str] | None) -> set[int]:
    """Return the ids of the weights that stay; one that has two names stays when either is named.

    Args:
        freeze: names, each one or several whole components of a path; or a pattern that matches a weight's
            path, or that of a module around it, as a whole.

    Raises:
        InvalidValueError: when a name or the pattern matches nothing, or everything.
    """
    if freeze is None:
        return set()
    if isinstance(freeze, str):
        frozen = _matching(freeze, weights)
    else:
        frozen = set()
        for name in freeze:
            found = {id(weight) for path, weight in weights.items() if f".{name}." in f".{path}."}
            if not found:
                raise _nothing_matches(name, weights)
            frozen |= found
    if frozen >= {id(weight) for weight in weights.values()}:
        raise InvalidValueError("freeze leaves nothing to train.", param="tuning.freeze")
    return frozen


def _matching(pattern: str, weights: Mapping[str, Any]) -> set[int]:
    ids: dict[str, set[int]] = {}
    for path, weight in weights.items():
        parts = path.split(".")
        for end in range(1, len(parts) + 1):
            ids.setdefault(".".join(parts[:end]), set()).add(id(weight))
    matched = match_paths(pattern, list(ids), "weights", "tuning.freeze")
    if not matched:
        raise _nothing_matches(pattern, weights)
    return set().union(*(ids[path] for path in matched))


def _nothing_matches(wanted: str, weights: Mapping[str, Any]) -> InvalidValueError:
    parts = sorted({part for path in weights for part in path.split(".") if not part.isdigit()})
    known = ", ".join(parts[:30])
    return InvalidValueError(
        f"{wanted[:80]!r} matches no weight of this base. Its paths are made of: {known}.",
        param="tuning.freeze",
    )


def _drop_local_facts(path: Path) -> None:
    content = json.loads(path.read_text())
    kept = {key: value for key, value in content.items() if key not in _LOCAL_KEYS}
    path.write_text(json.dumps(kept, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


METHOD = Full()
