"""Artifacts in memory: loaded when first wanted, held while requests need them, dropped when unused.

Runs on the event loop. What lies on a base is laid there and taken off by the engine's thread, between two
steps; a whole model is read and proved in a thread of its own, while everybody else's answers go on.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol, TypeVar

from luthier.core.errors import ArtifactCorruptError, OutOfMemoryError, TooManyRequestsError
from luthier.core.settings import MIB
from luthier.inference.bases import ReadyModel, ServedModel
from luthier.inference.copies import Copy
from luthier.inference.sequence import ModelKey
from luthier.inference.slots import ArtifactSlots
from luthier.inference.whole import load_whole, measure_whole
from luthier.methods import method_of_artifact

MAX_INSTALLED = 16

ResultT = TypeVar("ResultT")


class EngineLike(Protocol):
    """What loading asks of luthier.inference.engine.Engine."""

    def call(self, work: Callable[[], ResultT]) -> Future[ResultT]:
        """Run work on the engine's thread."""

    def sweep(self) -> Future[None]:
        """Let go of all rows that nobody waits for."""


@dataclass(eq=False)
class _Entry:
    """An artifact in memory, or on its way there. `num_bytes` is 0 for one that lies on its base."""

    served: ServedModel
    num_bytes: int
    loading: "asyncio.Task[ReadyModel]"
    num_holders: int = 0

    @property
    def is_idle(self) -> bool:
        """Whether nobody needs it now."""
        return self.num_holders == 0 and self.loading.done()

    @property
    def is_ready(self) -> bool:
        """Whether it is in memory and proved."""
        return self.loading.done() and not self.loading.cancelled() and self.loading.exception() is None


class LoadedArtifacts:
    """The artifacts of all bases.

    Args:
        engine: the engine's thread.
        max_whole_bytes: memory for the weights of whole models.
        max_waiting: requests that may wait for what is not in memory yet; more are refused.
        max_installed: artifacts that may lie on bases; the one unused for longest leaves first.
    """

    def __init__(
        self,
        engine: EngineLike,
        *,
        max_whole_bytes: int,
        max_waiting: int,
        max_installed: int = MAX_INSTALLED,
    ) -> None:
        self._engine = engine
        self._max_whole_bytes = max_whole_bytes
        self._max_waiting = max_waiting
        self._max_installed = max_installed
        self._num_waiting = 0
        # The one unused for longest first.
        self._entries: OrderedDict[ModelKey, _Entry] = OrderedDict()
        # Held by whoever waits for memory: asyncio's locks are fair, so that nobody overtakes.
        self._turn = asyncio.Lock()
        self._released = asyncio.Event()

    @property
    def digests(self) -> list[str]:
        """Digests of the artifacts in memory and of what they lie on, the one unused for longest first."""
        return [copy.digest for entry in list(self._entries.values()) for copy in entry.served.copies]

    @property
    def num_whole_bytes(self) -> int:
        """Memory of the whole models, those on their way included."""
        return sum(entry.num_bytes for entry in self._entries.values())

    async def hold(self, served: ServedModel) -> ReadyModel:
        """Return a model in memory, which stays there until it is released as often as it was held.

        Args:
            served: the model.

        Returns:
            The model, ready to answer.

        Raises:
            ArtifactCorruptError: when the artifact's files don't fit the base or each other.
            SelfCheckError: when it can't prove itself.
            OutOfMemoryError: when it is larger than all that whole models may take.
            TooManyRequestsError: when too many wait for models already.
        """
        if served.copy is None:
            return ReadyModel(served)
        entry = self._find(served)
        if entry is not None and entry.is_ready:
            self._entries.move_to_end(served.key)
            entry.num_holders += 1
            return entry.loading.result()
        # A name that outlived this wait would keep weights that are to leave.
        del entry
        if self._num_waiting >= self._max_waiting:
            raise TooManyRequestsError(f"{self._num_waiting} requests are waiting for models; try again.")
        self._num_waiting += 1
        try:
            return await self._wait(served, served.copy)
        finally:
            self._num_waiting -= 1

    def release(self, ready: ReadyModel) -> None:
        """Say that a request needs a model no longer."""
        entry = self._entries.get(ready.served.key)
        if entry is not None:
            self._release(entry)

    async def _wait(self, served: ServedModel, copy: Copy) -> ReadyModel:
        entry = self._find(served) or await self._find_room(served, copy)
        self._entries.move_to_end(served.key)
        entry.num_holders += 1
        try:
            return await asyncio.shield(entry.loading)
        except BaseException:
            self._release(entry)
            raise

    def _find(self, served: ServedModel) -> _Entry | None:
        """Return an artifact in memory, unless it is one of those for whose memory somebody waits."""
        entry = self._entries.get(served.key)
        return None if entry is None or (entry.num_bytes > 0 and self._turn.locked()) else entry

    async def _find_room(self, served: ServedModel, copy: Copy) -> _Entry:
        # With a foundation it has weights of its own too, which bear the artifact and nothing else.
        whole = served.foundation or copy
        if served.foundation is None and not await asyncio.to_thread(_is_whole, copy):
            return self._enter(served, 0)
        num_bytes = await asyncio.to_thread(measure_whole, whole.folder, served.base.dtype)
        async with self._turn:
            if served.key not in self._entries:
                await self._make_room(num_bytes)
            return self._enter(served, num_bytes)

    def _release(self, entry: _Entry) -> None:
        entry.num_holders -= 1
        self._released.set()

    def _enter(self, served: ServedModel, num_bytes: int) -> _Entry:
        entry = self._entries.get(served.key)
        if entry is None:
            if num_bytes == 0:
                self._leave_idle(lambda: self._num_installed < self._max_installed, is_whole=False)
            loading = asyncio.ensure_future(_load(self._engine, served, is_whole=num_bytes > 0))
            entry = self._entries[served.key] = _Entry(served, num_bytes, loading)
            loading.add_done_callback(lambda _: self._on_loaded(entry))
        return entry

    @property
    def _num_installed(self) -> int:
        return sum(entry.num_bytes == 0 for entry in self._entries.values())

    def _on_loaded(self, entry: _Entry) -> None:
        # A fresh entry may stand in the place of one that failed and was let go.
        if not entry.is_ready and self._entries.get(entry.served.key) is entry:
            del self._entries[entry.served.key]
        # Whoever wanted it may have left meanwhile: it is idle from now on.
        self._released.set()

    async def _make_room(self, num_bytes: int) -> None:
        if num_bytes > self._max_whole_bytes:
            raise OutOfMemoryError(
                f"This model's weights take {num_bytes / MIB:.0f} MiB; the model server may keep "
                f"{self._max_whole_bytes / MIB:.0f} MiB of fully tuned models. An operator raises "
                "LUTHIER_INFERENCE_MAX_WHOLE_MODELS_BYTES."
            )
        while True:
            self._released.clear()
            fits = self._leave_idle(
                lambda: self.num_whole_bytes + num_bytes <= self._max_whole_bytes, is_whole=True
            )
            # Rows whose client has left may still hold weights until their next turn.
            await asyncio.wrap_future(self._engine.sweep())
            if fits:
                return
            await self._released.wait()

    def _leave_idle(self, is_enough: Callable[[], bool], *, is_whole: bool) -> bool:
        """Drop idle artifacts of one kind, the one unused for longest first, until enough have left."""
        for key, entry in list(self._entries.items()):
            if is_enough():
                return True
            if not entry.is_idle or (entry.num_bytes > 0) is not is_whole:
                continue
            del self._entries[key]
            if not is_whole:
                _remove(self._engine, entry.served)
        return is_enough()


def _is_whole(copy: Copy) -> bool:
    return method_of_artifact(copy.folder).is_whole_model


async def _load(engine: EngineLike, served: ServedModel, *, is_whole: bool) -> ReadyModel:
    base, copy, digest = served.base, served.copy, served.digest
    if copy is None or digest is None:
        raise ArtifactCorruptError("The model has no artifact.")
    await asyncio.to_thread(copy.check)
    if served.foundation is not None:
        await asyncio.to_thread(served.foundation.check)
        return await asyncio.to_thread(_load_on_foundation, served, copy, served.foundation)
    if is_whole:
        whole = await asyncio.to_thread(
            load_whole,
            copy.folder,
            dtype=base.dtype,
            device=base.device,
            base_digest=base.facts.digest,
            probe_ids=base.probe_ids,
            base_logits_V=base.slots.base_logits_V,
        )
        return ReadyModel(served, whole=whole)
    installing = engine.call(lambda: base.slots.install(digest, copy.folder))
    return ReadyModel(served, prefix=await asyncio.wrap_future(installing))


def _load_on_foundation(served: ServedModel, copy: Copy, foundation: Copy) -> ReadyModel:
    """Load a whole model and lay an artifact on it, each proved; nobody else shares these weights."""
    base = served.base
    whole = load_whole(
        foundation.folder,
        dtype=base.dtype,
        device=base.device,
        base_digest=base.facts.digest,
        probe_ids=base.probe_ids,
        base_logits_V=base.slots.base_logits_V,
    )
    slots = ArtifactSlots(whole, base_digest=foundation.digest, probe_ids=base.probe_ids)
    prefix = slots.install(copy.digest, copy.folder)
    return ReadyModel(served, prefix=prefix, whole=slots.activate(copy.digest))


def _remove(engine: EngineLike, served: ServedModel) -> None:
    slots, digest = served.base.slots, served.digest
    if digest is not None:
        # Work is done in order: what is laid on the base again later comes after it.
        engine.call(lambda: slots.remove(digest))
