"""Loads a tuned model into memory: measures, checks, adds to a runner, verifies, removes.

Nothing here counts memory or decides who leaves.

Legend: `V` vocabulary.
"""

import asyncio
import logging
import weakref
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from luthier.core.errors import ArtifactCorruptError, BaseUnavailableError, OutOfMemoryError, SelfCheckError
from luthier.core.settings import MIB
from luthier.core.shapes import BaseShape, read_shape, read_tensor_shapes
from luthier.core.specs import Canary
from luthier.inference.engine.engine import Engine
from luthier.inference.engine.step import BatchExecutor
from luthier.inference.models.artifact_cache import CachedArtifact
from luthier.inference.models.base_models import (
    LoadedBase,
    ReadyModel,
    ServedModel,
    available_bytes,
    in_turn,
    load_weights,
    name_of,
)
from luthier.inference.runners.reference import ReferenceProvider
from luthier.inference.runners.registry import choose_runner
from luthier.inference.verification.checks import (
    check_base,
    check_finite,
    check_finite_weights,
    read_canary,
    verify_adapter,
    verify_full,
)
from luthier.methods import method_of_artifact
from luthier.modeling.protocols import (
    AdapterInfo,
    AdapterSource,
    Budget,
    LoadedWeights,
    UnsupportedAdapterError,
)

_LOG = logging.getLogger(__name__)

# How long a base stays in float32 for the next model that is to be verified.
_EXACT_SECONDS = 600.0
_DOES_NOT_FIT = "The artifact can't be loaded on its base model."
# Raised by transformers, runners and methods for weights that do not fit a model.
_MISFIT = (RuntimeError, ValueError, KeyError, TypeError, IndexError)


Opening = Callable[[int], AbstractAsyncContextManager[None]]


class Kind(Enum):
    """What an artifact is in memory: an adapter on its base, or a full model with weights of its own."""

    PACKED = "packed"
    WHOLE = "whole"


def measure(served: ServedModel) -> tuple[Kind, int]:
    """Return a model's kind and its bytes in memory. Reads headers only; any thread may call it."""
    copy, dtype = _copy_of(served), served.base.dtype
    if served.full_model is not None:
        return Kind.WHOLE, measure_weights(served.full_model.folder, dtype)
    is_full = method_of_artifact(copy.folder).is_whole_model
    return Kind.WHOLE if is_full else Kind.PACKED, measure_weights(copy.folder, dtype)


def measure_weights(folder: Path, dtype: torch.dtype) -> int:
    """Return the bytes of an artifact's weights in memory.

    Raises:
        ArtifactCorruptError: when a weights file has no header that can be read.
    """
    try:
        num_values = sum(
            prod(shape)
            for path in folder.glob("*.safetensors")
            for shape in read_tensor_shapes(path).values()
        )
    except (OSError, SafetensorError) as error:
        raise ArtifactCorruptError("The artifact's weights can't be read.") from error
    if num_values == 0:
        raise ArtifactCorruptError("The artifact has no weights.")
    return num_values * dtype.itemsize


async def load(
    engine: Engine,
    served: ServedModel,
    kind: Kind,
    budget: Budget,
    *,
    opening: Opening,
    spare: Opening,
) -> ReadyModel:
    """Bring a model into memory and verify it.

    On a base that is served in bfloat16 by the server's own choice a model is verified in float32 too, once
    for its copy. One that fails in bfloat16 alone is served in float32.

    Args:
        kind: as `measure` returns it.
        opening: entered with the bytes of further weights that are loaded.
        spare: the same for a verification, which takes the place of no other model or base.

    Raises:
        ArtifactCorruptError: when the artifact's files don't fit the base or each other.
        SelfCheckError: when it is not what training recorded.
    """
    base, copy = served.base, _copy_of(served)
    if base.load_exact is None:
        return await _load(engine, served, kind, budget, opening)
    ground = base.facts.digest if served.full_model is None else served.full_model.digest
    verified = await asyncio.to_thread(copy.verified_with, ground)
    if verified is None:
        # In turn: packing takes processors from a step that runs beside it, and both take far longer.
        is_exact = await _verify_exactly(engine, served, kind, budget, spare)
        try:
            ready = await _load(engine, served, kind, budget, opening)
        except SelfCheckError as error:
            if not is_exact:
                raise
            _LOG.warning("The model %s fails its check in bfloat16 alone: %s", copy.digest, error.message)
            await asyncio.to_thread(copy.note_verified, ground, name_of(torch.float32))
        else:
            if is_exact:
                await asyncio.to_thread(copy.note_verified, ground, name_of(base.dtype))
            return ready
    elif verified == name_of(base.dtype):
        return await _load(engine, served, kind, budget, opening)
    exact = await _open_exact(base, opening)
    _LOG.warning("The model %s is served in float32: it fails its check in bfloat16.", copy.digest)
    return await _load(engine, replace(served, base=exact), kind, budget, opening)


async def _verify_exactly(
    engine: Engine, served: ServedModel, kind: Kind, budget: Budget, opening: Opening
) -> bool:
    """Load a model in float32, which verifies it, and let it go; False where there is no memory for that."""
    try:
        exact = replace(served, base=await _open_exact(served.base, opening))
        _, num_bytes = await asyncio.to_thread(measure, exact)
        async with opening(2 * num_bytes if kind is Kind.WHOLE else num_bytes):
            remove(engine, await _load(engine, exact, kind, budget, opening))
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
    engine: Engine, served: ServedModel, kind: Kind, budget: Budget, opening: Opening
) -> ReadyModel:
    await _check(served)
    if kind is Kind.WHOLE:
        return await in_turn(_load_full, served, budget)
    base, copy = served.base, _copy_of(served)

    async def add_to(executor: BatchExecutor) -> ReadyModel:
        adapter = await asyncio.to_thread(_read_adapter, executor, copy, base.facts.digest, base.shape)
        # The files may have been changed while they were read.
        await _check(served)
        adding = engine.call(lambda: _add_verified(executor, adapter, base.probe_ids))
        info = await asyncio.wrap_future(adding)
        return ReadyModel(served, executor, info)

    try:
        return await add_to(base.executor)
    except UnsupportedAdapterError as error:
        _LOG.info("The reference runner serves %s: %s", copy.digest, error.message)
    if base.reference is None:
        async with opening(base.facts.num_parameters * base.dtype.itemsize):
            await in_turn(_open_reference, base, budget)
    assert base.reference is not None
    return await add_to(base.reference)


def remove(engine: Engine, ready: ReadyModel) -> None:
    """Remove a model, after the work that the engine was given before."""
    key, executor, adapter = ready.served.key, ready.executor, ready.adapter
    if ready.has_own_weights:
        engine.call(executor.runner.close)
    elif adapter is not None:
        engine.call(lambda: executor.remove_adapter(key, adapter))


def _copy_of(served: ServedModel) -> CachedArtifact:
    if served.copy is None:
        raise ArtifactCorruptError("The model has no artifact.")
    return served.copy


async def _check(served: ServedModel) -> None:
    """Make sure that the files are those of the artifacts."""
    for copy in served.copies:
        await asyncio.to_thread(copy.check)


@dataclass(frozen=True)
class _ReadAdapter:
    """An adapter that a runner can add, and what training recorded of it."""

    source: AdapterSource
    canary: Canary | None


def _read_adapter(
    executor: BatchExecutor, copy: CachedArtifact, base_digest: str, shape: BaseShape
) -> _ReadAdapter:
    """Read an artifact, check its numbers, and prepare it for a runner.

    Raises:
        UnsupportedAdapterError: when the runner does not support it.
    """
    manifest = check_base(copy.folder, base_digest)
    try:
        parts = method_of_artifact(copy.folder).read_parts(copy.folder, shape)
        if parts is None:
            check_finite_weights(copy.folder, manifest.digested)
        else:
            check_finite(parts.tensors)
        source = executor.runner.prepare_adapter(AdapterSource(copy.folder, parts))
    except _MISFIT as error:
        raise ArtifactCorruptError(_DOES_NOT_FIT) from error
    return _ReadAdapter(source, read_canary(copy.folder))


def _add_verified(executor: BatchExecutor, adapter: _ReadAdapter, probe_ids: list[int]) -> AdapterInfo:
    """Add an adapter to a runner and verify it; one that fails does not stay."""
    info = executor.runner.add_adapter(adapter.source)
    try:
        verify_adapter(executor, info, probe_ids, adapter.canary)
    except BaseException as error:
        executor.runner.remove_adapter(info.adapter)
        if isinstance(error, _MISFIT):
            raise ArtifactCorruptError(_DOES_NOT_FIT) from error
        raise
    return info


def _open_reference(base: LoadedBase, budget: Budget) -> None:
    """Load a second copy of a base, for adapters that the runner of the first does not support."""
    if base.reference is None:
        model = load_weights(base.folder, dtype=base.dtype, device=base.device)
        base.reference = _reference_executor(model, base.folder, budget)


def _reference_executor(model: PreTrainedModel, folder: Path, budget: Budget) -> BatchExecutor:
    return BatchExecutor(ReferenceProvider().load(LoadedWeights(model, folder), budget))


def _load_full(served: ServedModel, budget: Budget) -> ReadyModel:
    """Load a full model, and maybe an adapter on it, and verify each."""
    base, copy = served.base, _copy_of(served)
    folder = (served.full_model or copy).folder
    manifest = check_base(folder, base.facts.digest)
    check_finite_weights(folder, manifest.digested)
    load_model = partial(load_weights, folder, dtype=base.dtype, device=base.device, refuse_extra=True)
    try:
        executor = BatchExecutor(choose_runner(load_model, folder, budget, base.probe_ids))
        verify_full(executor, base.probe_ids, base.probe_logits, read_canary(folder))
        if served.full_model is None:
            return ReadyModel(served, executor)
        shape = read_shape(folder)
    except (*_MISFIT, BaseUnavailableError) as error:
        raise ArtifactCorruptError("The artifact can't be loaded as a model.") from error
    try:
        adapter = _read_adapter(executor, copy, served.full_model.digest, shape)
        return ReadyModel(served, executor, _add_verified(executor, adapter, base.probe_ids))
    except UnsupportedAdapterError as error:
        _LOG.info("The reference runner serves %s: %s", copy.digest, error.message)
    executor.runner.close()
    executor = _reference_executor(load_model(), folder, budget)
    adapter = _read_adapter(executor, copy, served.full_model.digest, shape)
    return ReadyModel(served, executor, _add_verified(executor, adapter, base.probe_ids))
