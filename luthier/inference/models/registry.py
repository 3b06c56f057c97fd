"""Resolves a target to a model in memory: base models and artifacts, each loaded once.

Runs on the event loop; long work runs in threads, so that it delays no other answer.
"""

import asyncio
import shutil
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch

from luthier.core.errors import ArtifactCorruptError, InvalidRequestError, OutOfMemoryError
from luthier.core.inference import (
    HEADER_ARTIFACT,
    HEADER_BASE,
    HEADER_DIGEST,
    HEADER_FULL_MODEL,
    HEADER_FULL_MODEL_DIGEST,
    HEADER_MODEL,
    HEADER_PINNED,
    HEADER_PROJECT,
    LoanRequest,
    ModelTarget,
)
from luthier.core.settings import MIB, Settings
from luthier.core.specs import BaseFacts
from luthier.inference.engine.engine import Engine
from luthier.inference.models import base_models
from luthier.inference.models.adapter_cache import AdapterCache
from luthier.inference.models.artifact_cache import (
    CachedArtifact,
    drop_orphans,
    drop_unused,
    fetch_artifact,
    find_deleted,
    link_artifact,
    mark_used,
    verify_copy,
)
from luthier.inference.models.base_models import LoadedBase, ReadyModel, ServedModel, in_turn
from luthier.inference.models.memory_limit import BlockMemory, MemoryLimit, NoRoomError, measure_used, trim
from luthier.storage.store import Storage


def read_target(headers: Mapping[str, str]) -> ModelTarget:
    """Read the target from a request's headers.

    Raises:
        InvalidRequestError: when a header is missing; only the API talks to this server.
    """
    try:
        target = ModelTarget(
            model=headers[HEADER_MODEL],
            base_id=headers[HEADER_BASE],
            project_id=headers[HEADER_PROJECT],
            artifact=headers.get(HEADER_ARTIFACT),
            digest=headers.get(HEADER_DIGEST),
            full_model=headers.get(HEADER_FULL_MODEL),
            full_model_digest=headers.get(HEADER_FULL_MODEL_DIGEST),
            is_pinned=headers.get(HEADER_PINNED) == "1",
        )
    except KeyError as error:
        raise InvalidRequestError(f"The header {error.args[0]} is missing.") from error
    if (target.artifact is None) != (target.digest is None):
        raise InvalidRequestError(f"{HEADER_ARTIFACT} and {HEADER_DIGEST} come together or not at all.")
    has_full_model = target.full_model is not None
    if has_full_model != (target.full_model_digest is not None) or (has_full_model and not target.artifact):
        raise InvalidRequestError(
            f"{HEADER_FULL_MODEL} and {HEADER_FULL_MODEL_DIGEST} come together and with an artifact, or not "
            "at all."
        )
    return target


class Models:
    """What this process has loaded or fetched.

    Args:
        settings: folders of bases and artifacts, and memory for full models.
        on_first_base: called in a thread when a base was loaded, before anybody has it or anything else is.
    """

    def __init__(
        self, settings: Settings, engine: Engine, on_first_base: Callable[[], None] | None = None
    ) -> None:
        self._settings, self._engine = settings, engine
        self._on_first_base = on_first_base
        device = torch.device(base_models.choose_device(settings))
        device_bytes = base_models.find_serving_device(settings).serving_bytes
        serving_bytes = device_bytes // settings.inference_processes
        self._max_base_bytes = settings.inference_max_bases_bytes or serving_bytes * 3 // 4
        self.memory = MemoryLimit(
            serving_bytes,
            engine.call,
            self._block_memories,
            measure=lambda: measure_used(device),
            trim=lambda: trim(device),
        )
        self.loaded = AdapterCache(
            engine,
            max_whole_bytes=settings.inference_max_whole_models_bytes or serving_bytes // 2,
            max_adapter_bytes=settings.inference_max_adapters_bytes or serving_bytes // 4,
            max_pinned_share=settings.max_pinned_share,
            budget=base_models.make_budget(settings),
            max_waiting=settings.max_waiting_requests,
            fit=self.memory.fit,
            drop_base=self._drop_base,
        )
        self._storage: Storage | None = None
        # The bases without an artifact, by id, the one unused for longest first.
        self._bases: OrderedDict[str, ReadyModel] = OrderedDict()
        # Bytes of bases on their way, and requests that need a base, by its id.
        self._coming: dict[str, int] = {}
        self._num_users: Counter[str] = Counter()
        self._served: dict[tuple[str, str], ServedModel] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._loading: dict[str, asyncio.Task[None]] = {}

    def _block_memories(self) -> list[BlockMemory]:
        """Return the memory of all runners' blocks; also called on the engine's thread."""
        bases = [bare.base for bare in list(self._bases.values())]
        loaded = [one for base in bases for one in (base, base.exact()) if one is not None]
        of_bases = [executor for base in loaded for executor in base.executors]
        return [BlockMemory(executor) for executor in (*of_bases, *self.loaded.executors)]

    def is_loaded(self, base_id: str) -> bool:
        """Whether a base is in memory."""
        return base_id in self._bases

    @property
    def base_ids(self) -> list[str]:
        """The bases in memory."""
        return list(self._bases)

    async def get_base(self, base_id: str) -> LoadedBase:
        """Return a base, loaded on its first use.

        Raises:
            ModelNotFoundError: when it has not been fetched.
            OutOfMemoryError: when it is larger than all that bases may take.
            NoRoomError: when what is needed now leaves it no memory.
        """
        facts = await asyncio.to_thread(base_models.get_base_facts, self._settings, base_id)
        if base_id not in self._bases:
            loading = self._loading.get(base_id)
            if loading is None:
                loading = self._loading[base_id] = asyncio.ensure_future(self._load_base(base_id, facts))
                loading.add_done_callback(partial(self._end_loading, base_id))
            # The request may be cancelled; the next one finds the base.
            await asyncio.shield(loading)
        return self._bases[base_id].base

    async def _load_base(self, base_id: str, facts: BaseFacts) -> None:
        num_bytes = base_models.weights_bytes(self._settings, facts)
        self._make_room(num_bytes)
        self._coming[base_id] = num_bytes
        try:
            # What of it is packed at a time is there too.
            if not await self.loaded.make_way(3 * num_bytes // 2):
                raise NoRoomError("The model server has no memory for this base now; try again.")
            with self.loaded.expecting(3 * num_bytes // 2):
                base = await in_turn(self._load_first, base_id)
                self._bases[base_id] = ReadyModel(ServedModel(base), base.executor)
        finally:
            del self._coming[base_id]
        # What was read of it is gone, and should not count as held.
        await asyncio.to_thread(self.memory.trim)
        await self.memory.fit(self.loaded.loading_bytes)

    def _make_room(self, num_bytes: int) -> None:
        """Let bases leave that no request needs until another one fits."""
        if num_bytes > self._max_base_bytes:
            raise OutOfMemoryError(
                f"This base's weights take {num_bytes / MIB:.1f} MiB; the model server may keep "
                f"{self._max_base_bytes / MIB:.1f} MiB of base_models. An operator raises "
                "LUTHIER_INFERENCE_MAX_BASES_BYTES."
            )
        while self._num_base_bytes + num_bytes > self._max_base_bytes and self._drop_base():
            pass
        if self._num_base_bytes + num_bytes > self._max_base_bytes:
            raise NoRoomError(
                f"Bases that are in use hold {self._num_base_bytes / MIB:.1f} MiB of the "
                f"{self._max_base_bytes / MIB:.1f} MiB that the model server may keep of them; try again."
            )

    def _drop_base(self) -> bool:
        """Drop the idle base unused for longest, those with pinned models last; return whether one left."""
        for base_id in sorted(self._bases, key=self.loaded.has_pinned):
            # Without the preloaded one the process is not ready.
            is_needed = base_id == self._settings.preload_base or self._num_users[base_id] > 0
            if not is_needed and self.loaded.drop_base(base_id):
                for executor in self._bases.pop(base_id).base.executors:
                    self._engine.call(executor.runner.close)
                self._served = {key: one for key, one in self._served.items() if key[0] != base_id}
                return True
        return False

    @property
    def _num_base_bytes(self) -> int:
        return sum(bare.base.num_bytes for bare in self._bases.values()) + sum(self._coming.values())

    def _load_first(self, base_id: str) -> LoadedBase:
        """Load a base, and call `on_first_base` for the first one before any request has it."""
        base = base_models.load(self._settings, base_id)
        on_first_base, self._on_first_base = self._on_first_base, None
        if on_first_base is not None:
            on_first_base()
        return base

    def _end_loading(self, base_id: str, loading: "asyncio.Task[None]") -> None:
        del self._loading[base_id]
        if not loading.cancelled():
            # All requests that waited may be cancelled.
            loading.exception()

    async def get(self, target: ModelTarget) -> ServedModel:
        """Return the model that a target names, its base loaded and its artifact on the local disk."""
        return await self._find(await self._get_bare(target.base_id), target)

    async def _get_bare(self, base_id: str) -> ReadyModel:
        if base_id not in self._bases:
            await self.get_base(base_id)
        self._bases.move_to_end(base_id)
        return self._bases[base_id]

    async def _find(self, bare: ReadyModel, target: ModelTarget) -> ServedModel:
        if target.digest is None:
            return bare.served
        served = self._served.get((target.base_id, target.digest))
        if served is None:
            return await self._place(bare.base, target, failed=None)
        for copy in served.copies:
            mark_used(copy.folder)
        return served

    async def hold(self, target: ModelTarget) -> ReadyModel:
        """Return the model that a target names in memory, where it stays until it is released.

        Raises:
            ModelNotFoundError: when the base has not been fetched.
            ArtifactCorruptError: when the artifact is missing or damaged.
            SelfCheckError: when the artifact can't prove itself.
            OutOfMemoryError: when a whole model is larger than all of them may be.
            TooManyRequestsError: when too many wait for models already.
        """
        self._num_users[target.base_id] += 1
        try:
            return await self._hold(target)
        except BaseException:
            self._num_users[target.base_id] -= 1
            raise

    async def _hold(self, target: ModelTarget) -> ReadyModel:
        bare = await self._get_bare(target.base_id)
        if target.digest is None:
            return bare
        served = await self._find(bare, target)
        pinned_by = target.project_id if target.is_pinned else None
        try:
            return await self.loaded.hold(served, pinned_by=pinned_by)
        except ArtifactCorruptError:
            # The copy on this disk may be at fault, which a new one heals.
            restored = await self._restore(target, served)
            if restored is None:
                raise
        return await self.loaded.hold(restored, pinned_by=pinned_by)

    def release(self, ready: ReadyModel) -> None:
        """Say that a request needs a model no longer."""
        self._num_users[ready.base.facts.id] -= 1
        if ready.served.digest is not None:
            self.loaded.release(ready)

    async def lend(self, asked: LoanRequest) -> int:
        """Lend memory to a job, or take it back; return the bytes that are lent."""
        lent_bytes = await self.memory.lend(asked, self.loaded.loading_bytes)
        self.loaded.wake()
        return lent_bytes

    async def drop_deleted(self) -> None:
        """Remove artifacts from memory and this disk that were deleted from storage.

        Raises:
            UnavailableError: when storage can't be used right now.
        """
        # Loans may have lapsed.
        self.memory.limit_pages(self.loaded.loading_bytes)
        if self._storage is None:
            self._storage = await asyncio.to_thread(Storage.open, self._settings.storage_url)
        storage, cache_dir = self._storage, self._settings.cache_dir / "artifacts"
        copies = {copy.digest: copy for served in self._served.values() for copy in served.copies}
        held = set(self.loaded.digests)

        def find() -> list[CachedArtifact]:
            if storage.is_empty():
                # Rather away than deleted to the last file: what is in memory is all that answers.
                return []
            drop_orphans(storage, cache_dir, copies)
            wanted = (copy for digest, copy in copies.items() if digest in held or copy.folder.is_dir())
            return find_deleted(storage, wanted)

        for copy in await asyncio.to_thread(find):
            # One that is answering just now is found again.
            if self.loaded.forget(copy.digest):
                for key in [key for key in self._served if key[1] == copy.digest]:
                    del self._served[key]
                await asyncio.to_thread(shutil.rmtree, copy.folder, ignore_errors=True)

    async def _restore(self, target: ModelTarget, failed: ServedModel) -> ServedModel | None:
        """Fetch a model's artifact anew, unless its copy is whole, so that another would be no better."""
        if target.artifact is None or target.digest is None or failed.copy is None:
            return None
        is_same = self._served.get((target.base_id, target.digest)) is failed
        if is_same and await asyncio.to_thread(_are_whole, failed.copies):
            return None
        return await self._place(failed.base, target, failed=failed)

    async def _place(
        self, base: LoadedBase, target: ModelTarget, *, failed: ServedModel | None
    ) -> ServedModel:
        """Return the served model, fetched unless another request did so meanwhile."""
        digest = str(target.digest)
        key = (base.facts.id, digest)
        async with self._locks.setdefault(digest, asyncio.Lock()):
            served = self._served.get(key)
            if served is None or served is failed:
                self._served.pop(key, None)
                # A copy that is there and failed is not to be found again.
                may_link = failed is None or not any(copy.folder.is_dir() for copy in failed.copies)
                served = await asyncio.to_thread(self._fetch, base, target, may_link=may_link)
                self._served[key] = served
        self._locks.pop(digest, None)
        return served

    def _fetch(self, base: LoadedBase, target: ModelTarget, *, may_link: bool) -> ServedModel:
        if self._storage is None:
            self._storage = Storage.open(self._settings.storage_url)
        cache_dir = self._settings.cache_dir / "artifacts"
        wanted = ((target.artifact, target.digest), (target.full_model, target.full_model_digest))
        copies: dict[str, CachedArtifact] = {}
        for artifact, digest in wanted:
            if artifact is not None and digest is not None:
                linked = link_artifact(self._storage, artifact, digest, cache_dir) if may_link else None
                copies[digest] = linked or fetch_artifact(self._storage, artifact, digest, cache_dir)
                mark_used(copies[digest].folder)
        # A copy that a waiting request still wants is younger than most, and is fetched again if it leaves.
        in_use = {*self.loaded.digests, *copies}
        drop_unused(cache_dir, max_kept=self._settings.max_cached_artifacts, in_use=in_use)
        return ServedModel(
            base,
            target.digest,
            copies.get(str(target.digest)),
            copies.get(str(target.full_model_digest)),
        )


def _are_whole(copies: Iterable[CachedArtifact]) -> bool:
    return all(verify_copy(copy.folder) is not None for copy in copies)
