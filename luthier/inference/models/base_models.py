"""Base models in memory: weights, tokenizer and template, loaded once and shared by all tuned models."""

import asyncio
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import torch
from transformers import PreTrainedModel

from luthier.bases.catalogue import base_folder, find_base_facts
from luthier.core.devices import Device, cpu_multiplies_bf16, find_device
from luthier.core.errors import ModelNotFoundError
from luthier.core.settings import Settings
from luthier.core.shapes import BaseShape, read_shape
from luthier.core.specs import BaseFacts
from luthier.data.rendering.chat_template import ChatTemplate
from luthier.data.rendering.token_bounds import TokenBounds, find_bounds
from luthier.data.rendering.tokenizer import Tokenizer
from luthier.inference.engine.sequence import ModelKey
from luthier.inference.engine.step import BatchExecutor
from luthier.inference.models.artifact_cache import CachedArtifact
from luthier.inference.runners.registry import choose_runner
from luthier.inference.verification.checks import Text, probe
from luthier.modeling.load import load_base
from luthier.modeling.protocols import AdapterInfo, Budget

_LOG = logging.getLogger(__name__)


@dataclass(eq=False)
class LoadedBase:
    """A base model in memory, and the executor of its batches.

    `reference` is the executor of a second copy, which is loaded for adapters that the first one's runner
    does not support. `load_exact` loads the base in float32 where it is served in bfloat16 by the server's
    own choice; `exact` returns that one while it is in memory. `probe_logits` are those after `probe_ids`.
    """

    facts: BaseFacts
    folder: Path
    tokenizer: Tokenizer
    template: ChatTemplate
    device: torch.device
    dtype: torch.dtype
    probe_ids: list[int]
    executor: BatchExecutor
    reference: BatchExecutor | None = None
    load_exact: "Callable[[], LoadedBase] | None" = None
    exact: "Callable[[], LoadedBase | None]" = lambda: None

    @property
    def executors(self) -> list[BatchExecutor]:
        """Those of its copies."""
        return [self.executor] if self.reference is None else [self.executor, self.reference]

    @property
    def num_bytes(self) -> int:
        """Memory of its weights."""
        return len(self.executors) * self.facts.num_parameters * self.dtype.itemsize

    @cached_property
    def shape(self) -> BaseShape:
        """Sizes of its weights."""
        return read_shape(self.folder)

    @cached_property
    def probe_logits(self) -> torch.Tensor:
        """Its logits after `probe_ids`, float32; computed when it is loaded."""
        return probe(self.executor, [Text(self.probe_ids, None)])[0].last_V

    @cached_property
    def token_bounds(self) -> TokenBounds | None:
        """How few tokens a text can have, None where that is not known."""
        return find_bounds(self.tokenizer)


@dataclass(frozen=True)
class ServedModel:
    """A base, and maybe an artifact of it: its digest and the verified copy on the local disk.

    `full_model` is the cached full model that the artifact was trained on instead of the base.
    """

    base: LoadedBase
    digest: str | None = None
    copy: CachedArtifact | None = None
    full_model: CachedArtifact | None = None

    @cached_property
    def key(self) -> ModelKey:
        """Identifies the weights."""
        return self.base.facts.id, self.digest

    @property
    def copies(self) -> tuple[CachedArtifact, ...]:
        """The copies on the local disk that it is made of."""
        return tuple(copy for copy in (self.copy, self.full_model) if copy is not None)

    @cached_property
    def full_digest(self) -> str:
        """The digest of what answers, the base's own where there is no artifact."""
        return self.digest or self.base.facts.digest

    @cached_property
    def fingerprint(self) -> str:
        """The first 12 hex digits of the digest that answers, and the type of the weights."""
        return f"{self.full_digest.removeprefix('sha256:')[:12]}-{name_of(self.base.dtype)}"


@dataclass(frozen=True, eq=False)
class ReadyModel:
    """A served model in memory: the executor of its batches, and its adapter, None for bare weights."""

    served: ServedModel
    executor: BatchExecutor
    adapter: AdapterInfo | None = None

    @cached_property
    def base(self) -> LoadedBase:
        """The base that it was made from, whose tokenizer and template it uses."""
        return self.served.base

    @property
    def has_own_weights(self) -> bool:
        """Whether it runs on weights that no other model of its base does."""
        return self.executor not in self.base.executors

    @cached_property
    def num_virtual_tokens(self) -> int:
        """Tokens before every sequence, which take positions of the context and of the cache."""
        return 0 if self.adapter is None else self.adapter.num_virtual_tokens


def name_of(dtype: torch.dtype) -> str:
    """Return a type's name as settings and answers have it: float32 or bfloat16."""
    return str(dtype).removeprefix("torch.")


def choose_dtype(settings: Settings, device: str) -> torch.dtype:
    """Return the type to serve bases in; devices that emulate bfloat16 are many times slower in it."""
    if settings.inference_dtype != "auto":
        return torch.bfloat16 if settings.inference_dtype == "bfloat16" else torch.float32
    if device == "cpu":
        has_it = cpu_multiplies_bf16()
    else:
        has_it = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_it else torch.float32


def get_base_facts(settings: Settings, base_id: str) -> BaseFacts:
    """Look a fetched base up.

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
    """Load a fetched base onto the device of the settings. Takes seconds; only one thread may call it."""
    facts = get_base_facts(settings, base_id)
    folder = base_folder(settings.bases_dir, base_id)
    device = torch.device(choose_device(settings))
    may_choose = dtype is None and settings.inference_dtype == "auto" and device.type == "cpu"
    dtype = dtype or choose_dtype(settings, device.type)
    tokenizer = Tokenizer.load(folder)
    probe_ids = tokenizer.encode("Hello, who is there?")
    load_model = partial(load_weights, folder, dtype=dtype, device=device)
    executor = BatchExecutor(choose_runner(load_model, folder, make_budget(settings), probe_ids))
    base = LoadedBase(
        facts=_within_positions(facts, executor.runner.limits.context_length),
        folder=folder,
        tokenizer=tokenizer,
        template=ChatTemplate.load(folder),
        device=device,
        dtype=dtype,
        probe_ids=probe_ids,
        executor=executor,
        load_exact=partial(load, settings, base_id, torch.float32)
        if may_choose and dtype is not torch.float32
        else None,
    )
    # Nothing else uses the runner yet.
    _ = base.probe_logits
    return base


def make_budget(settings: Settings) -> Budget:
    """Return what the runner of each model may hold."""
    return Budget(
        max_cache_tokens=settings.max_cache_tokens,
        max_sequences=settings.max_batch_rows,
        max_draft_tokens=settings.max_draft_tokens,
    )


def _within_positions(facts: BaseFacts, num_positions: int) -> BaseFacts:
    """Return the facts with a context that the runner has positions for."""
    if num_positions >= facts.context_length:
        return facts
    _LOG.warning(
        "The base %s has %d positions; its context of %d tokens is cut to them.",
        facts.id,
        num_positions,
        facts.context_length,
    )
    return facts.model_copy(update={"context_length": num_positions})


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
    dtype = choose_dtype(settings, choose_device(settings))
    return facts.num_parameters * dtype.itemsize


ArgumentsT = TypeVarTuple("ArgumentsT")
ResultT = TypeVar("ResultT")

# transformers changes torch itself while it builds a model, its initialisers and its default type. Of two
# threads that do so at once each may put the other's changes back, and no model can be loaded any more.
_ONE_AT_A_TIME = threading.Lock()
# A load that waits holds no thread that others need.
_THREAD = ThreadPoolExecutor(
    1, thread_name_prefix="weights", initializer=torch.set_num_threads, initargs=(1,)
)


async def in_turn(work: Callable[[*ArgumentsT], ResultT], *arguments: *ArgumentsT) -> ResultT:
    """Run work that loads weights in the one thread for that, after all that was asked for before."""
    return await asyncio.get_running_loop().run_in_executor(_THREAD, work, *arguments)


def load_weights(
    folder: Path, *, dtype: torch.dtype, device: torch.device, refuse_extra: bool = False
) -> PreTrainedModel:
    """Load a causal language model as `load_base` does; any thread may call it.

    Raises:
        BaseUnavailableError: when the folder can't be read as a model, or lacks some of its tensors.
    """
    with _ONE_AT_A_TIME:
        return load_base(folder, dtype=dtype, device=str(device), refuse_extra=refuse_extra)


def available_bytes() -> int:
    """Return how much memory the machine has left; the kernel's word, which knows no limit of a container."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
