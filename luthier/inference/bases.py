"""Bases in memory: weights, tokenizer and template of each, loaded once and shared by all its models."""

import os
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from luthier.bases.catalogue import base_folder, find_base_facts
from luthier.core.errors import ModelNotFoundError
from luthier.core.settings import Settings
from luthier.core.specs import BaseFacts
from luthier.data.render import ChatTemplate
from luthier.data.tokens import Tokenizer
from luthier.inference.copies import Copy
from luthier.inference.forward import Prefix, count_virtual_tokens
from luthier.inference.sequence import ModelKey
from luthier.inference.slots import ArtifactSlots
from luthier.modeling.load import load_base


@dataclass(eq=False)
class LoadedBase:
    """A base that can answer. Only the engine's thread may touch `slots` and the weights behind it."""

    facts: BaseFacts
    tokenizer: Tokenizer
    template: ChatTemplate
    slots: ArtifactSlots
    device: torch.device
    dtype: torch.dtype
    probe_ids: list[int]


@dataclass(frozen=True)
class ServedModel:
    """A base, and maybe an artifact of it: its digest and the verified copy on the local disk.

    `foundation` is the copy of the whole model that the artifact lies on in place of the base's weights.
    """

    base: LoadedBase
    digest: str | None = None
    copy: Copy | None = None
    foundation: Copy | None = None

    @property
    def key(self) -> ModelKey:
        """What tells this model's weights from any other's."""
        return self.base.facts.id, self.digest

    @property
    def copies(self) -> tuple[Copy, ...]:
        """The copies on the local disk that it is made of."""
        return tuple(copy for copy in (self.copy, self.foundation) if copy is not None)

    @property
    def full_digest(self) -> str:
        """The digest of what answers, the base's own where there is no artifact."""
        return self.digest or self.base.facts.digest

    @property
    def fingerprint(self) -> str:
        """The first 12 hex digits of the digest that answers."""
        return self.full_digest.removeprefix("sha256:")[:12]


@dataclass(frozen=True, eq=False)
class ReadyModel:
    """A served model in memory.

    `prefix` lies before every sequence; `whole` are weights of its own, in place of its base's, with what
    lies on them switched on for good.
    """

    served: ServedModel
    prefix: Prefix = ()
    whole: PreTrainedModel | None = None

    @property
    def base(self) -> LoadedBase:
        """The base that it was made from, whose tokenizer and template it uses."""
        return self.served.base

    @property
    def num_virtual_tokens(self) -> int:
        """Tokens that the prefix takes from the context and from the cache of every row."""
        return count_virtual_tokens(self.prefix)

    def activate(self) -> PreTrainedModel:
        """Return the module whose next forward passes are this model's; for the engine's thread only."""
        if self.whole is not None:
            return self.whole
        return self.base.slots.activate(self.served.digest)


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
    device, dtype = _choose_device(settings), _choose_dtype(settings)
    model = load_base(folder, dtype=dtype, device=device)
    tokenizer = Tokenizer.load(folder)
    probe_ids = tokenizer.encode("Hello, who is there?")
    return LoadedBase(
        facts=facts,
        tokenizer=tokenizer,
        template=ChatTemplate.load(folder),
        slots=ArtifactSlots(model, base_digest=facts.digest, probe_ids=probe_ids),
        device=torch.device(device),
        dtype=dtype,
        probe_ids=probe_ids,
    )


def max_whole_bytes(settings: Settings) -> int:
    """Return how much memory whole models may take.

    Args:
        settings: the operator's number, or 0, and the device.

    Returns:
        Bytes; a quarter of the device's memory where the operator named none.
    """
    if settings.inference_max_whole_models_bytes:
        return settings.inference_max_whole_models_bytes
    if _choose_device(settings) == "cpu":
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    else:
        total = torch.cuda.get_device_properties(_choose_device(settings)).total_memory
    return int(total) // 4


def _choose_device(settings: Settings) -> str:
    if settings.device != "auto":
        return settings.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _choose_dtype(settings: Settings) -> torch.dtype:
    if settings.inference_dtype == "auto":
        return torch.float32 if _choose_device(settings) == "cpu" else torch.bfloat16
    return torch.bfloat16 if settings.inference_dtype == "bfloat16" else torch.float32
