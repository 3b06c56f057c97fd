"""Bases in memory: weights, tokenizer and template of each, loaded once and shared by all its models."""

import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from luthier.bases.catalogue import base_folder, find_base_facts
from luthier.core.errors import ModelNotFoundError
from luthier.core.settings import Settings
from luthier.core.specs import BaseFacts
from luthier.data.render import ChatTemplate
from luthier.data.tokens import Tokenizer
from luthier.inference.adapters import AdapterSlots
from luthier.inference.sequence import ModelKey
from luthier.modeling.load import load_base


@dataclass(eq=False)
class LoadedBase:
    """A base that can answer. Only the engine's thread may touch `slots` and the weights behind it."""

    facts: BaseFacts
    tokenizer: Tokenizer
    template: ChatTemplate
    slots: AdapterSlots
    device: torch.device
    takes_positions: bool
    takes_logits_to_keep: bool
    # transformers renamed it; older versions know the old name only.
    cache_argument: str


@dataclass(frozen=True)
class ServedModel:
    """A base, and maybe an artifact on it: its digest and the local folder that was verified."""

    base: LoadedBase
    digest: str | None = None
    folder: Path | None = None

    @property
    def key(self) -> ModelKey:
        """What tells this model's weights from any other's."""
        return self.base.facts.id, self.digest

    @property
    def fingerprint(self) -> str:
        """The first 12 hex digits of the digest that answers."""
        return (self.digest or self.base.facts.digest).removeprefix("sha256:")[:12]


def get_base_facts(settings: Settings, base_id: str) -> BaseFacts:
    """Look a fetched base up.

    Args:
        settings: says where bases lie.
        base_id: the base's id.

    Returns:
        What is known of it.

    Raises:
        ModelNotFoundError: when it has not been fetched; says how to.
    """
    facts = find_base_facts(settings.bases_dir, base_id)
    if facts is None:
        raise ModelNotFoundError(
            f"The base model {base_id[:80]!r} is not on this server yet. An operator fetches it with: "
            f"luthier bases fetch {base_id[:80]}",
            param="model",
        )
    return facts


def load(settings: Settings, base_id: str) -> LoadedBase:
    """Load a fetched base onto the device of the settings. Takes seconds; any thread may call it.

    Args:
        settings: says where bases lie, the device and the type of the weights.
        base_id: the base's id.

    Returns:
        The base, ready to answer.

    Raises:
        ModelNotFoundError: when it has not been fetched.
    """
    facts = get_base_facts(settings, base_id)
    folder = base_folder(settings.bases_dir, base_id)
    device = _choose_device(settings)
    model = load_base(folder, dtype=_choose_dtype(settings, device), device=device).eval()
    tokenizer = Tokenizer.load(folder)
    probe_ids = tokenizer.encode("Hello, who is there?")
    return LoadedBase(
        facts=facts,
        tokenizer=tokenizer,
        template=ChatTemplate.load(folder),
        slots=AdapterSlots(model, base_digest=facts.digest, probe_ids=probe_ids),
        device=torch.device(device),
        takes_positions=_takes(model, "position_ids"),
        takes_logits_to_keep=_takes(model, "logits_to_keep"),
        cache_argument="cache" if _takes(model, "cache") else "past_key_values",
    )


def _choose_device(settings: Settings) -> str:
    if settings.device != "auto":
        return settings.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _choose_dtype(settings: Settings, device: str) -> torch.dtype:
    if settings.inference_dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    return torch.bfloat16 if settings.inference_dtype == "bfloat16" else torch.float32


def _takes(model: PreTrainedModel, argument: str) -> bool:
    return argument in inspect.signature(model.forward).parameters
