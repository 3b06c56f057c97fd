"""From an artifact's copy to weights that answer: measured, checked, packed, verified, and taken away.

Nothing here counts memory or decides who leaves.

Legend: `V` vocabulary.
"""

import asyncio
import logging
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from transformers import PreTrainedModel

from luthier.core.errors import ArtifactCorruptError, OutOfMemoryError, SelfCheckError
from luthier.core.settings import MIB
from luthier.core.specs import Canary
from luthier.inference.bases import LoadedBase, PackedWeights, ReadyModel, ServedModel, pack
from luthier.inference.copies import Copy
from luthier.inference.engine.step import BatchExecutor
from luthier.inference.proofs import (
    check_base,
    check_canary,
    check_probe,
    read_canary,
)
from luthier.inference.slots import ArtifactSlots
from luthier.inference.verification import Text, dtype_of, probe, verify_adapter
from luthier.inference.weight_type import name_of
from luthier.inference.weights import available_bytes, in_turn, load_weights
from luthier.inference.whole import load_whole, measure_whole, prove_whole
from luthier.methods import ServedParts, method_of_artifact
from luthier.modeling.packed_llama import can_pack_llama
from luthier.modeling.protocols import AdapterInfo, AdapterSource, UnsupportedAdapterError

_LOG = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")

_OPENING = threading.Lock()
# How long a base stays in float32 for the next model that is to be verified.
_EXACT_SECONDS = 600.0
# Of a text that training recorded; it takes four, and took up to sixteen.
_MOST_CANARY_TOKENS = 64
_NOT_FINITE = "The model's weights are not finite; it is not served."


Opening = Callable[[int], AbstractAsyncContextManager[None]]


class EngineLike(Protocol):
    """What loading asks of luthier.inference.engine.Engine."""

    def call(self, work: Callable[[], ResultT]) -> Future[ResultT]:
        """Run work on the engine's thread."""

    def sweep(self) -> Future[None]:
        """Drop finished and cancelled sequences."""


class Kind(Enum):
    """How an artifact lies in memory: beside a packed base, on a plain one, or as weights of its own."""

    PACKED = "packed"
    INSTALLED = "installed"
    WHOLE = "whole"


def measure(served: ServedModel) -> tuple[Kind, int]:
    """Tell how a model will lie in memory. Reads headers only; any thread may call it.

    Returns:
        Its kind, and the bytes that it will take: exact for whole models, 0 for those on a plain base.

    Raises:
        ArtifactCorruptError: when a weights file has no header that can be read.
    """
    copy = _copy_of(served)
    # With a foundation it has weights of its own too, which bear the artifact and nothing else.
    whole = served.foundation or copy
    if served.foundation is not None or method_of_artifact(copy.folder).is_whole_model:
        return Kind.WHOLE, measure_whole(whole.folder, served.base.dtype)
    if served.base.packed is None:
        return Kind.INSTALLED, 0
    return Kind.PACKED, measure_whole(copy.folder, served.base.dtype)


async def load(
    engine: EngineLike,
    served: ServedModel,
    kind: Kind,
    limits: "RowLimits",
    *,
    opening: Opening,
    spare: Opening,
) -> ReadyModel:
    """Bring a model into memory and verify it.

    On a base that is served in bfloat16 by the server's own choice a model is verified in float32 too, once
    for its copy. One that fails in bfloat16 alone is served in float32.

    Args:
        kind: what `measure` told.
        opening: entered while weights of so many bytes more are loaded beside it.
        spare: the same for a verification, which takes the place of no other model or base.

    Returns:
        The model, ready to answer.

    Raises:
        ArtifactCorruptError: when the artifact's files don't fit the base or each other.
        SelfCheckError: when it is not what training recorded.
    """
    base, copy = served.base, _copy_of(served)
    if base.load_exact is None:
        return await _load(engine, served, kind, limits, opening)
    ground = base.facts.digest if served.foundation is None else served.foundation.digest
    verified = await asyncio.to_thread(copy.verified_with, ground)
    if verified is None:
        # Once for both.
        await _check(served)
        is_exact, found = await asyncio.gather(
            _verify_exactly(engine, served, kind, limits, spare),
            _load(engine, served, kind, limits, opening),
            return_exceptions=True,
        )
        if isinstance(is_exact, BaseException):
            if not isinstance(found, BaseException):
                remove(engine, found)
            raise is_exact
        if not isinstance(found, BaseException):
            if is_exact:
                await asyncio.to_thread(copy.note_verified, ground, name_of(base.dtype))
            return found
        if not (is_exact and isinstance(found, SelfCheckError)):
            raise found
        _LOG.warning("The model %s fails its check in bfloat16 alone: %s", copy.digest, found.message)
        await asyncio.to_thread(copy.note_verified, ground, name_of(torch.float32))
    elif verified == name_of(base.dtype):
        return await _load(engine, served, kind, limits, opening)
    exact = await _open_exact(base, opening)
    _LOG.warning("The model %s is served in float32: it fails its check in bfloat16.", copy.digest)
    return await _load(engine, replace(served, base=exact), kind, limits, opening)


async def _verify_exactly(
    engine: EngineLike, served: ServedModel, kind: Kind, limits: "RowLimits", opening: Opening
) -> bool:
    """Load a model in float32, which verifies it, and let it go; False where there is no memory for that."""
    try:
        exact = replace(served, base=await _open_exact(served.base, opening))
        _, num_bytes = await asyncio.to_thread(measure, exact)
        async with opening(2 * num_bytes if kind is Kind.WHOLE else num_bytes):
            remove(engine, await _load(engine, exact, kind, limits, opening))
    except OutOfMemoryError as error:
        digest = _copy_of(served).digest
        _LOG.warning(
            "The model %s is verified in bfloat16 alone for want of memory: %s", digest, error.message
        )
        return False
    return True


async def _open_exact(base: LoadedBase, opening: Opening) -> LoadedBase:
    """Return a base in float32, loaded beside it where it is not in memory.

    It leaves when no model has wanted it for a while, and none is served on it.

    Raises:
        OutOfMemoryError: when there is no memory for it.
    """
    exact = base.exact()
    if exact is None:
        num_bytes = base.facts.num_parameters * torch.float32.itemsize
        if 3 * num_bytes // 2 > await asyncio.to_thread(available_bytes):
            raise OutOfMemoryError(f"{base.facts.id} takes {num_bytes / MIB:.0f} MiB more in float32.")
        async with opening(3 * num_bytes // 2):
            exact = await in_turn(_load_exact, base)
    # The timer's reference.
    asyncio.get_running_loop().call_later(_EXACT_SECONDS, lambda _: None, exact)
    return exact


def _load_exact(base: LoadedBase) -> LoadedBase:
    # Another may have asked for it just before.
    exact = base.exact()
    if exact is not None:
        return exact
    assert base.load_exact is not None
    exact = base.load_exact()
    base.exact = weakref.ref(exact)
    _LOG.info(
        "%s is in memory in float32 too (%.0f MiB): models are verified in it.",
        base.facts.id,
        base.facts.num_parameters * torch.float32.itemsize / MIB,
    )
    return exact


async def _load(
    engine: EngineLike, served: ServedModel, kind: Kind, limits: "RowLimits", opening: Opening
) -> ReadyModel:
    copy, packed = _copy_of(served), served.base.packed
    await _check(served)
    if kind is Kind.PACKED and packed is not None:
        laid = await asyncio.to_thread(_lay_out, copy, packed, served.base.facts.digest)
        # They may have been changed while they were read.
        await _check(served)
        if laid is not None:
            executor, probe_ids = packed.executor, served.base.probe_ids
            adding = engine.call(lambda: _add_verified(executor, laid, probe_ids))
            adapter = await asyncio.wrap_future(adding)
            return ReadyModel(served, executor=executor, adapter=adapter)
        if served.base.slots is None:
            async with opening(served.base.facts.num_parameters * served.base.dtype.itemsize):
                await in_turn(_open_slots, served.base, packed)
    if kind is Kind.WHOLE:
        return await in_turn(_load_whole, served, limits)
    slots, digest = served.base.plain, copy.digest
    installing = engine.call(lambda: slots.install(digest, copy.folder))
    return ReadyModel(served, prefix=await asyncio.wrap_future(installing))


def remove(engine: EngineLike, ready: ReadyModel) -> None:
    """Take a model off its base, after all that was asked of the engine before."""
    served, digest, executor, adapter = ready.served, ready.served.digest, ready.executor, ready.adapter
    if ready.has_own_weights or digest is None:
        return
    if executor is None or adapter is None:
        engine.call(lambda: served.base.plain.remove(digest))
    else:
        engine.call(lambda: executor.remove_adapter(served.key, adapter))


@dataclass(frozen=True, kw_only=True)
class RowLimits:
    """How many rows, tokens of all of them, and guesses of each run on one model's own weights."""

    max_rows: int
    max_cache_tokens: int
    max_draft_tokens: int = 0


def _copy_of(served: ServedModel) -> Copy:
    if served.copy is None:
        raise ArtifactCorruptError("The model has no artifact.")
    return served.copy


async def _check(served: ServedModel) -> None:
    """Make sure that the files are those of the artifacts."""
    for copy in served.copies:
        await asyncio.to_thread(copy.check)


@dataclass(frozen=True)
class _Laid:
    """An adapter that is ready to be added, and what training recorded of it."""

    source: AdapterSource
    canary: Canary | None


def _lay_out(copy: Copy, packed: PackedWeights, base_digest: str) -> _Laid | None:
    """Prepare an artifact for its base's runner, and read what training recorded of it.

    None where only the plain path can serve it.
    """
    check_base(copy.folder, base_digest)
    runner = packed.executor.runner
    parts = method_of_artifact(copy.folder).read_parts(copy.folder, packed.shape)
    if parts is None:
        return None
    _check_finite(parts)
    try:
        source = runner.prepare_adapter(AdapterSource(copy.folder, parts))
    except UnsupportedAdapterError:
        return None
    canary = read_canary(copy.folder)
    if canary is not None:
        num_positions = runner.limits.context_length - parts.num_virtual_tokens
        _check_tokens(canary, runner.limits.vocabulary_size, num_positions)
    return _Laid(source, canary)


def _add_verified(executor: BatchExecutor, laid: _Laid, probe_ids: list[int]) -> AdapterInfo:
    """Add an adapter to a runner and verify it; one that fails does not stay."""
    adapter = executor.runner.add_adapter(laid.source)
    try:
        verify_adapter(executor, adapter, probe_ids, laid.canary)
    except BaseException:
        executor.runner.remove_adapter(adapter.adapter)
        raise
    return adapter


def _check_tokens(canary: Canary, vocabulary_size: int, num_positions: int) -> None:
    """Check a text before the engine runs it: a hash says whose it is, and not that it is one."""
    ids = canary.token_ids
    are_known = min(ids) >= 0 and max(ids) < vocabulary_size
    if not are_known or len(ids) > min(_MOST_CANARY_TOKENS, num_positions):
        raise ArtifactCorruptError("What training recorded of the model is no short text of its base.")


def _check_finite(parts: ServedParts) -> None:
    """Check every number; a probe alone may not meet one that is not finite."""
    # A sum is not finite if any number is not, and takes one pass; one that overflows is looked at closely.
    tensors = parts.tensors
    sums = [tensor.sum(dtype=torch.float32) for tensor in tensors]
    suspects = (~torch.isfinite(torch.stack(sums))).nonzero().flatten().tolist() if sums else []
    if not all(bool(torch.isfinite(tensors[place]).all()) for place in suspects):
        raise SelfCheckError(_NOT_FINITE)


def _prove_whole(
    executor: BatchExecutor, probe_ids: list[int], base_logits_V: torch.Tensor, canary: Canary | None
) -> None:
    """Let weights of their own prove themselves as an adapter does, beside what their base says."""
    texts = [Text(probe_ids, None), *([] if canary is None else [Text(canary.token_ids, None)])]
    said = probe(executor, texts)
    check_probe(said[0].last_V, base_logits_V)
    check_canary(canary, dtype_of(executor), lambda _token_ids: said[-1].last_V)


def _open_slots(base: LoadedBase, packed: PackedWeights) -> None:
    """Load the plain path's weights of a packed base, for an artifact with no place in the packed."""
    with _OPENING:
        if base.slots is None:
            model = load_weights(packed.folder, dtype=base.dtype, device=base.device)
            base.slots = ArtifactSlots(model, base_digest=base.facts.digest, probe_ids=base.probe_ids)


def _load_whole(served: ServedModel, limits: RowLimits) -> ReadyModel:
    """Load a whole model, and maybe an artifact on it, each proved; nobody else shares these weights."""
    base, copy = served.base, _copy_of(served)
    folder = (served.foundation or copy).folder
    whole = load_whole(
        folder,
        dtype=base.dtype,
        device=base.device,
        base_digest=base.facts.digest,
    )
    can_pack = can_pack_llama(whole)
    if base.packed is None or not can_pack:
        # By the path that its base answered by: on another, equal weights would differ by rounding.
        prove_whole(whole, folder, base.probe_ids, base.probe_logits())
    if can_pack:
        packed = _pack_whole(whole, folder, base.probe_ids, limits)
        _prove_whole(packed.executor, base.probe_ids, base.probe_logits(), read_canary(folder))
        if served.foundation is None:
            return ReadyModel(served, executor=packed.executor)
        made = _lay_out(copy, packed, served.foundation.digest)
        if made is not None:
            # No other thread has the executor yet.
            adapter = _add_verified(packed.executor, made, base.probe_ids)
            return ReadyModel(served, executor=packed.executor, adapter=adapter)
    if served.foundation is None:
        return ReadyModel(served, whole=whole)
    if can_pack:
        # What was packed is used up.
        whole = load_weights(folder, dtype=base.dtype, device=base.device)
    slots = ArtifactSlots(whole, base_digest=served.foundation.digest, probe_ids=base.probe_ids)
    prefix = slots.install(copy.digest, copy.folder)
    return ReadyModel(served, prefix=prefix, whole=slots.activate(copy.digest))


def _pack_whole(
    whole: PreTrainedModel, folder: Path, probe_ids: list[int], limits: RowLimits
) -> PackedWeights:
    try:
        return pack(whole, folder, probe_ids, **asdict(limits))
    except (RuntimeError, TypeError, IndexError) as error:
        raise ArtifactCorruptError("The artifact can't be loaded as a model.") from error
