"""The cache of adapters and full models in memory: loaded on first use, evicted when idle.

Runs on the event loop; loading.py loads and removes them. Adapters and full models have a budget of bytes
each; together they stay below the limit of the process (memory_limit.py).
"""

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import NamedTuple

from luthier.core.errors import OutOfMemoryError, TooManyRequestsError
from luthier.core.settings import MIB
from luthier.inference.engine.engine import Engine
from luthier.inference.engine.sequence import ModelKey
from luthier.inference.engine.step import BatchExecutor
from luthier.inference.models.base_models import ReadyModel, ServedModel
from luthier.inference.models.loading import Kind, load, measure, remove
from luthier.inference.models.memory_limit import NoRoomError
from luthier.modeling.protocols import Budget

# A pin that no request has renewed for so long is let go of: the model may be deleted, or asked elsewhere.
_PIN_SECONDS = 86_400.0


class CacheStats(NamedTuple):
    """Artifacts of one kind: in memory, with their bytes and the most these may be, and over all time."""

    num_models: int
    num_bytes: int
    max_bytes: int
    num_loads: int
    num_evictions: int


@dataclass(eq=False)
class CacheEntry:
    """An artifact in memory, or on its way there.

    `loading` ends with its verification.
    """

    served: ServedModel
    kind: Kind
    num_bytes: int
    loading: "asyncio.Task[ReadyModel]"
    num_holders: int = 0
    # A moment of the monotonic clock.
    pinned_until: float = 0.0
    pinned_by: str = ""

    def pin(self, project_id: str | None) -> None:
        """Let it stay from now on as a project's pinned model, or leave when it is idle."""
        self.pinned_until = 0.0 if project_id is None else time.monotonic() + _PIN_SECONDS
        self.pinned_by = project_id or ""

    @property
    def is_pinned(self) -> bool:
        """Whether it stays while idle."""
        return time.monotonic() < self.pinned_until

    @property
    def is_idle(self) -> bool:
        """Whether no request uses it and it may be evicted."""
        return self.num_holders == 0 and not self.is_pinned and self.loading.done()

    @property
    def is_ready(self) -> bool:
        """Whether it is in memory and verified."""
        done = self.loading.done() and not self.loading.cancelled()
        return done and self.loading.exception() is None


_SETTINGS = {
    Kind.WHOLE: "LUTHIER_INFERENCE_MAX_WHOLE_MODELS_BYTES",
    Kind.PACKED: "LUTHIER_INFERENCE_MAX_ADAPTERS_BYTES",
}


# While weights are converted, the read ones are in memory too.
_LOADED_TIMES = {Kind.WHOLE: 2, Kind.PACKED: 1}
_NAMES = {Kind.WHOLE: "fully tuned models", Kind.PACKED: "adapters"}


class AdapterCache:
    """The artifacts of all bases.

    Args:
        max_whole_bytes: memory for the weights of whole models.
        budget: of the runner of each model that is loaded.
        max_pinned_share: of the memory of each kind, for the pinned models of one project.
        max_waiting: requests that may wait for what is not in memory yet; more are refused.
        fit: makes room for a number of bytes, and returns how many are still missing.
        drop_base: drops a base that no request needs, and returns whether there was one.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_whole_bytes: int,
        max_adapter_bytes: int,
        max_pinned_share: float,
        budget: Budget,
        max_waiting: int,
        fit: Callable[[int], Awaitable[int]],
        drop_base: Callable[[], bool] = lambda: False,
    ) -> None:
        self._engine = engine
        self._budget = budget
        self._max_bytes = {Kind.WHOLE: max_whole_bytes, Kind.PACKED: max_adapter_bytes}
        self._max_pinned_share = max_pinned_share
        self._max_waiting = max_waiting
        self._fit = fit
        self._drop_base = drop_base
        self._num_waiting = 0
        self._num_loads: Counter[Kind] = Counter()
        self._num_evictions: Counter[Kind] = Counter()
        # Of bases on their way, which are no entries.
        self._expected_bytes = 0
        # Two that looked for room at once would both take what there is.
        self._making_way = asyncio.Lock()
        # The one unused for longest first.
        self._entries: OrderedDict[ModelKey, CacheEntry] = OrderedDict()
        # Held by the request that waits for memory: asyncio's locks are fair.
        self._turns = {kind: asyncio.Lock() for kind in self._max_bytes}
        # One for each kind, which clears its own alone.
        self._released = {kind: asyncio.Event() for kind in self._max_bytes}

    @property
    def digests(self) -> list[str]:
        """Digests of the artifacts in memory and of the full models below them, least recently used first."""
        return [copy.digest for entry in list(self._entries.values()) for copy in entry.served.copies]

    @property
    def held(self) -> list[str]:
        """Digests of the artifacts that can be asked here, those on their way to the memory included."""
        return [digest for _, digest in list(self._entries) if digest is not None]

    def num_bytes(self, kind: Kind) -> int:
        """Return the memory that artifacts of one kind take, those on their way included."""
        return sum(entry.num_bytes for entry in self._entries.values() if entry.kind is kind)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a model."""
        return self._num_waiting

    def stats(self, kind: Kind) -> CacheStats:
        """Return how many artifacts of one kind there are and were."""
        count = sum(entry.kind is kind for entry in self._entries.values())
        loads, evictions = self._num_loads[kind], self._num_evictions[kind]
        return CacheStats(count, self.num_bytes(kind), self._max_bytes[kind], loads, evictions)

    @property
    def executors(self) -> list[BatchExecutor]:
        """Those of whole models in memory."""
        ready = [entry.loading.result() for entry in list(self._entries.values()) if entry.is_ready]
        return [one.executor for one in ready if one.has_own_weights]

    @property
    def loading_bytes(self) -> int:
        """Bytes of what is on its way to the memory."""
        loading = (entry.num_bytes for entry in self._entries.values() if not entry.loading.done())
        return sum(loading) + self._expected_bytes

    @contextmanager
    def expecting(self, num_bytes: int) -> Iterator[None]:
        """Count weights that are no artifact as on their way."""
        self._expected_bytes += num_bytes
        try:
            yield
        finally:
            self._expected_bytes -= num_bytes

    @property
    def leaving_bytes(self) -> int:
        """Bytes of the artifacts that can be evicted once they are idle."""
        return sum(entry.num_bytes for entry in self._entries.values() if not entry.is_pinned)

    async def give_back(self, num_bytes: int) -> None:
        """Drop idle artifacts, the one unused for longest first, until so much is free."""
        if self._drop_idle(num_bytes):
            # Sequences of clients that left may hold them until the engine's next step.
            await asyncio.wrap_future(self._engine.sweep())

    def forget(self, digest: str) -> bool:
        """Evict a deleted artifact, unless a request uses it; return whether it is out of memory."""
        for key, entry in list(self._entries.items()):
            if key[1] == digest and entry.num_holders == 0 and entry.is_ready:
                self._drop(key, entry)
        self.wake()
        return digest not in self.digests

    def has_pinned(self, base_id: str) -> bool:
        """Whether a pinned artifact is on a base."""
        return any(entry.is_pinned for key, entry in self._entries.items() if key[0] == base_id)

    def drop_base(self, base_id: str) -> bool:
        """Drop all artifacts of a base, pinned ones too, unless one of them is needed or on its way."""
        found = [(key, entry) for key, entry in self._entries.items() if key[0] == base_id]
        if any(entry.num_holders > 0 or not entry.is_ready for _, entry in found):
            return False
        for key, entry in found:
            self._drop(key, entry)
        return True

    async def make_way(self, num_bytes: int) -> bool:
        """Make room below the limit, by pages, idle artifacts and bases; the caller takes it before it waits.

        Returns:
            Whether there is room now; else there may be once a request has ended.

        Raises:
            NoRoomError: when there would be none even then.
        """
        async with self._making_way:
            missing = await self._fit(num_bytes + self.loading_bytes)
            # Nothing is evicted for a model that would not fit all the same.
            if 0 < missing <= self.leaving_bytes:
                await self.give_back(missing)
                missing = await self._fit(num_bytes + self.loading_bytes)
            while missing > self.leaving_bytes and self._drop_base():
                missing = await self._fit(num_bytes + self.loading_bytes)
        if missing > self.leaving_bytes:
            raise NoRoomError(
                f"The model server has no memory for this model's {num_bytes / MIB:.1f} MiB beside what is "
                "needed now; try again later. An operator raises LUTHIER_SERVING_MEMORY_SHARE."
            )
        return missing <= 0

    async def hold(self, served: ServedModel, *, pinned_by: str | None = None) -> ReadyModel:
        """Return a model in memory, where it stays until it is released as often as it was held.

        Args:
            pinned_by: the project as whose pinned model it stays when idle, for a day or until it
                is held without one; as far as that project's share of the memory goes.

        Raises:
            ArtifactCorruptError: when the artifact's files don't fit the base or each other.
            SelfCheckError: when it is not what training recorded.
            OutOfMemoryError: when it is larger than all that its kind may take.
            TooManyRequestsError: when too many wait for models already.
        """
        if served.digest is None:
            return ReadyModel(served, served.base.executor)
        entry = self._find(served)
        if entry is not None and entry.is_ready:
            self._entries.move_to_end(served.key)
            entry.num_holders += 1
            self._pin(entry, pinned_by)
            return entry.loading.result()
        # A name that outlived this wait would keep weights that are to leave.
        del entry
        if self._num_waiting >= self._max_waiting:
            raise TooManyRequestsError(f"{self._num_waiting} requests are waiting for models; try again.")
        self._num_waiting += 1
        try:
            return await self._wait(served, pinned_by)
        finally:
            self._num_waiting -= 1

    def release(self, ready: ReadyModel) -> None:
        """Release a held model."""
        entry = self._entries.get(ready.served.key)
        if entry is not None:
            self._release(entry)

    async def _wait(self, served: ServedModel, pinned_by: str | None) -> ReadyModel:
        entry = self._find(served) or await self._find_room(served)
        self._entries.move_to_end(served.key)
        entry.num_holders += 1
        self._pin(entry, pinned_by)
        try:
            return await asyncio.shield(entry.loading)
        except BaseException:
            self._release(entry)
            raise

    def _pin(self, entry: CacheEntry, project_id: str | None) -> None:
        """Pin an artifact unless its project's pinned ones would take more than their share with it."""
        if project_id is not None:
            others = (one for one in self._entries.values() if one is not entry and one.kind is entry.kind)
            pinned = sum(one.num_bytes for one in others if one.is_pinned and one.pinned_by == project_id)
            max_bytes = self._max_pinned_share * self._max_bytes[entry.kind]
            if pinned + entry.num_bytes > max_bytes:
                project_id = None
        entry.pin(project_id)

    def _find(self, served: ServedModel) -> CacheEntry | None:
        """Return an artifact in memory, unless a request waits for memory of its kind."""
        entry = self._entries.get(served.key)
        if entry is None or self._turns[entry.kind].locked():
            return None
        return entry

    async def _find_room(self, served: ServedModel) -> CacheEntry:
        kind, num_bytes = await asyncio.to_thread(measure, served)
        async with self._turns[kind]:
            if served.key not in self._entries:
                await self._make_room(kind, num_bytes)
            return self._enter(served, kind, num_bytes)

    def _release(self, entry: CacheEntry) -> None:
        entry.num_holders -= 1
        self.wake()

    def wake(self) -> None:
        """Wake the requests that wait for room."""
        for event in self._released.values():
            event.set()

    def _enter(self, served: ServedModel, kind: Kind, num_bytes: int) -> CacheEntry:
        entry = self._entries.get(served.key)
        if entry is None:
            loading = asyncio.ensure_future(self._load(served, kind))
            entry = self._entries[served.key] = CacheEntry(served, kind, num_bytes, loading)
            loading.add_done_callback(lambda _: self._on_loaded(entry))
        return entry

    async def _load(self, served: ServedModel, kind: Kind) -> ReadyModel:
        ready = await load(self._engine, served, kind, self._budget, opening=self._opening, spare=self._spare)
        if ready.has_own_weights or served.base.exact() is not None:
            # It has pages of its own.
            await self._fit(self.loading_bytes)
        return ready

    @asynccontextmanager
    async def _opening(self, num_bytes: int) -> AsyncIterator[None]:
        """Let a second copy of a base be loaded, if there is room for it."""
        if not await self.make_way(num_bytes):
            raise NoRoomError("The model server has no memory for this model's base now; try again.")
        with self.expecting(num_bytes):
            yield

    @asynccontextmanager
    async def _spare(self, num_bytes: int) -> AsyncIterator[None]:
        """Let weights be loaded for a verification, for which no model and no base leaves."""
        async with self._making_way:
            missing = await self._fit(num_bytes + self.loading_bytes)
        if missing > 0:
            raise NoRoomError("The model server has no memory to spare.")
        with self.expecting(num_bytes):
            yield

    def _on_loaded(self, entry: CacheEntry) -> None:
        # A fresh entry may stand in the place of one that failed and was let go.
        if entry.is_ready:
            self._num_loads[entry.kind] += 1
        elif self._entries.get(entry.served.key) is entry:
            del self._entries[entry.served.key]
        # The request may have been cancelled meanwhile: it is idle from now on.
        self.wake()

    async def _make_room(self, kind: Kind, num_bytes: int) -> None:
        max_bytes = self._max_bytes[kind]
        if num_bytes > max_bytes:
            raise OutOfMemoryError(
                f"This model's weights take {num_bytes / MIB:.1f} MiB; the model server may keep "
                f"{max_bytes / MIB:.1f} MiB of {_NAMES[kind]}. An operator raises {_SETTINGS[kind]}."
            )
        while True:
            entries = self._entries.values()
            pinned = sum(one.num_bytes for one in entries if one.is_pinned and one.kind is kind)
            if pinned + num_bytes > max_bytes:
                raise OutOfMemoryError(
                    f"Pinned models hold {pinned / MIB:.1f} MiB of the {max_bytes / MIB:.1f} MiB that the "
                    f"model server may keep of {_NAMES[kind]}. Unpin one, or let an operator raise "
                    f"{_SETTINGS[kind]}."
                )
            self._released[kind].clear()
            if self._leave_idle(kind, lambda: self.num_bytes(kind) + num_bytes <= max_bytes):
                if kind is Kind.WHOLE:
                    # Sequences of clients that left may hold weights until the engine's next step.
                    await asyncio.wrap_future(self._engine.sweep())
                if await self.make_way(_LOADED_TIMES[kind] * num_bytes):
                    return
            await asyncio.wrap_future(self._engine.sweep())
            await self._released[kind].wait()

    def _drop_idle(self, num_bytes: int) -> int:
        """Drop idle artifacts of any kind, and every name here for them; return their bytes."""
        dropped = 0
        for key, entry in list(self._entries.items()):
            if dropped < num_bytes and entry.num_bytes and entry.is_idle and entry.is_ready:
                self._drop(key, entry)
                dropped += entry.num_bytes
        return dropped

    def _leave_idle(self, kind: Kind, is_enough: Callable[[], bool]) -> bool:
        """Drop idle artifacts of one kind, the one unused for longest first, until enough have left."""
        for key, entry in list(self._entries.items()):
            if is_enough():
                return True
            if entry.is_idle and entry.is_ready and entry.kind is kind:
                self._drop(key, entry)
        return is_enough()

    def _drop(self, key: ModelKey, entry: CacheEntry) -> None:
        del self._entries[key]
        self._num_evictions[entry.kind] += 1
        remove(self._engine, entry.loading.result())
