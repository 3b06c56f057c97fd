"""Bases in memory: weights, tokenizer and template of each, loaded once and shared by all its models."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from luthier.bases.catalogue import base_folder, find_base_facts
from luthier.core.devices import Device, find_device
from luthier.core.errors import ArtifactCorruptError, ModelNotFoundError
from luthier.core.settings import Settings
from luthier.core.shapes import BaseShape, read_shape
from luthier.core.specs import BaseFacts
from luthier.data.rendering.chat_template import ChatTemplate
from luthier.data.rendering.token_bounds import TokenBounds, find_bounds
from luthier.data.rendering.tokenizer import Tokenizer
from luthier.inference.copies import Copy
from luthier.inference.engine.sequence import ModelKey
from luthier.inference.engine.step import BatchExecutor
from luthier.inference.forward import Prefix, count_virtual_tokens
from luthier.inference.slots import ArtifactSlots
from luthier.inference.verification import Text, probe
from luthier.inference.weight_type import choose_dtype, find_dtype, name_of
from luthier.inference.weights import load_weights, read_weight
from luthier.modeling.kernels.choosing import prepare_choices
from luthier.modeling.kernels.served_rows import PAGE_SIZE
from luthier.modeling.packed_llama import PackedLlama, can_pack_llama
from luthier.modeling.packed_runner import PackedRunner
from luthier.modeling.protocols import AdapterInfo

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class PackedWeights:
    """Weights that are packed for serving, and the executor of their batches.

    `folder` and `shape` are those of the files that they were read from.
    """

    executor: BatchExecutor
    folder: Path
    shape: BaseShape
    logits_V: torch.Tensor


@dataclass(eq=False)
class LoadedBase:
    """A base that can answer: packed where its architecture is known, else by the plain path.

    Only the engine's thread may touch executor, slots and the weights behind them. `load_exact` loads it in
    float32 where it is served in bfloat16 by the server's own choice; `exact` is what that gave, while that
    is in memory.
    """

    facts: BaseFacts
    tokenizer: Tokenizer
    template: ChatTemplate
    device: torch.device
    dtype: torch.dtype
    probe_ids: list[int]
    slots: ArtifactSlots | None = None
    packed: PackedWeights | None = None
    load_exact: "Callable[[], LoadedBase] | None" = None
    exact: "Callable[[], LoadedBase | None]" = lambda: None

    @property
    def num_bytes(self) -> int:
        """Memory of its weights: packed, and as the plain path needs them."""
        copies = (self.packed is not None) + (self.slots is not None)
        return copies * self.facts.num_parameters * self.dtype.itemsize

    def probe_logits(self) -> torch.Tensor:
        """Return what the base says after the probe, float32 of the vocabulary's size."""
        if self.packed is not None:
            return self.packed.logits_V
        return self.plain.base_logits_V

    @cached_property
    def token_bounds(self) -> TokenBounds | None:
        """How few tokens a text can have, None where that is not known."""
        return find_bounds(self.tokenizer)

    @property
    def plain(self) -> ArtifactSlots:
        """The plain path's weights, which a packed base has only where an artifact wants them."""
        if self.slots is None:
            raise ArtifactCorruptError("The base is not loaded for this artifact.")
        return self.slots


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
        """The first 12 hex digits of the digest that answers, and the type of the weights."""
        return f"{self.full_digest.removeprefix('sha256:')[:12]}-{name_of(self.base.dtype)}"


@dataclass(frozen=True, eq=False)
class ReadyModel:
    """A served model in memory.

    With an `executor` its sequences run beside those of others, with its `adapter`. Without one it runs
    alone: `prefix` lies before every sequence; `whole` are weights of its own instead of its base's, with
    what is on them switched on for good.
    """

    served: ServedModel
    prefix: Prefix = ()
    whole: PreTrainedModel | None = None
    executor: BatchExecutor | None = None
    adapter: AdapterInfo | None = None

    @property
    def base(self) -> LoadedBase:
        """The base that it was made from, whose tokenizer and template it uses."""
        return self.served.base

    @property
    def has_own_weights(self) -> bool:
        """Whether it runs on weights that no other model of its base does."""
        packed = self.base.packed
        is_shared = packed is not None and self.executor is packed.executor
        return self.whole is not None or (self.executor is not None and not is_shared)

    @property
    def num_virtual_tokens(self) -> int:
        """Tokens that lie before every sequence; they take room from the context and from the cache."""
        if self.adapter is not None:
            return self.adapter.num_virtual_tokens
        return count_virtual_tokens(self.prefix)

    def activate(self) -> PreTrainedModel:
        """Return the module whose next forward passes are this model's; for the engine's thread only."""
        if self.whole is not None:
            return self.whole
        return self.base.plain.activate(self.served.digest)


def get_base_facts(settings: Settings, base_id: str) -> BaseFacts:
    """Look a fetched base up.

    Args:
        settings: says where bases lie.

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


def load(settings: Settings, base_id: str, dtype: torch.dtype | None = None) -> LoadedBase:
    """Load a fetched base onto the device of the settings. Takes seconds; only one thread may call it.

    Args:
        settings: says where bases lie, the device and the type of the weights.
        dtype: another type than that.

    Returns:
        The base, ready to answer.

    Raises:
        ModelNotFoundError: when it has not been fetched.
    """
    facts = get_base_facts(settings, base_id)
    folder = base_folder(settings.bases_dir, base_id)
    device = torch.device(choose_device(settings))
    may_choose = dtype is None and settings.inference_dtype == "auto" and device.type == "cpu"
    dtype = dtype or choose_dtype(settings, facts, device.type)
    tokenizer = Tokenizer.load(folder)
    model = load_weights(folder, dtype=dtype, device=device)
    base = LoadedBase(
        facts=_within_positions(facts, model),
        tokenizer=tokenizer,
        template=ChatTemplate.load(folder),
        device=device,
        dtype=dtype,
        probe_ids=tokenizer.encode("Hello, who is there?"),
        load_exact=partial(load, settings, base_id, torch.float32)
        if may_choose and dtype is not torch.float32
        else None,
    )
    if can_pack_llama(model):
        base.packed = pack(
            model,
            folder,
            base.probe_ids,
            max_rows=settings.max_batch_rows,
            max_cache_tokens=settings.max_cache_tokens,
            max_draft_tokens=settings.max_draft_tokens,
        )
    else:
        base.slots = ArtifactSlots(model, base_digest=facts.digest, probe_ids=base.probe_ids)
    # The plain path's logits are float32.
    prepare_choices(torch.float32)
    return base


def _within_positions(facts: BaseFacts, model: PreTrainedModel) -> BaseFacts:
    """Return the facts with a context that the model has positions for, whatever the file beside it says."""
    # Some kinds of models name no number, for they count distances alone.
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is None or positions >= facts.context_length:
        return facts
    _LOG.warning(
        "The base %s has %d positions; its context of %d tokens is cut to them.",
        facts.id,
        positions,
        facts.context_length,
    )
    return facts.model_copy(update={"context_length": positions})


def pack(
    model: PreTrainedModel,
    folder: Path,
    probe_ids: list[int],
    *,
    max_rows: int,
    max_cache_tokens: int,
    max_draft_tokens: int = 0,
) -> PackedWeights:
    """Pack weights for serving. The model is used up by it.

    Args:
        model: of the kind that `can_pack_llama` tells.
        folder: the files that it was read from.
        probe_ids: tokens of a short text.
        max_cache_tokens: tokens whose keys and values may be held.
        max_draft_tokens: as PackedRunner takes it.

    Returns:
        The weights with an executor of their own.
    """
    # One block more than whole tokens need: a token of a sequence may begin a new one.
    num_blocks = -(-max_cache_tokens // PAGE_SIZE) + 1
    num_own = -(-model.config.max_position_embeddings // PAGE_SIZE)
    packed = PackedLlama(model, num_pages=num_blocks + num_own)
    runner = PackedRunner(
        packed,
        lambda path: read_weight(folder, path),
        num_blocks=num_blocks,
        max_sequences=max_rows,
        max_draft_tokens=max_draft_tokens,
    )
    executor = BatchExecutor(runner)
    [said] = probe(executor, [Text(probe_ids, None)])
    return PackedWeights(executor, folder, read_shape(folder), said.last_V)


def max_base_bytes(settings: Settings) -> int:
    """Return how much memory bases may take; three quarters of its own where the operator named none."""
    return settings.inference_max_bases_bytes or serving_bytes(settings) * 3 // 4


def max_whole_bytes(settings: Settings) -> int:
    """Return how much memory whole models may take.

    Args:
        settings: the operator's number, or 0, and the device.

    Returns:
        Bytes; half of the process's where the operator named none.
    """
    return settings.inference_max_whole_models_bytes or serving_bytes(settings) // 2


def max_adapter_bytes(settings: Settings) -> int:
    """Return how much memory adapters may take; a quarter of the process's where the operator named none."""
    return settings.inference_max_adapters_bytes or serving_bytes(settings) // 4


def serving_bytes(settings: Settings) -> int:
    """Return this process's part of the device's memory."""
    return find_serving_device(settings).serving_bytes // settings.inference_processes


def find_serving_device(settings: Settings) -> Device:
    """Return the device that this process serves on."""
    kind = choose_device(settings)
    found = find_device(settings.model_copy(update={"device": kind}))
    if found is None:
        # Its driver does not say it.
        total = torch.cuda.get_device_properties(kind).total_memory
        found = find_device(settings.model_copy(update={"device": kind, "device_memory_bytes": total}))
    assert found is not None
    return found


def choose_device(settings: Settings) -> str:
    """Return where to serve: `cpu` or `cuda`."""
    if settings.device != "auto":
        return settings.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def weights_bytes(settings: Settings, facts: BaseFacts) -> int:
    """Return the memory that a base's weights will take."""
    dtype = find_dtype(settings, facts, choose_device(settings)) or torch.float32
    return facts.num_parameters * dtype.itemsize
