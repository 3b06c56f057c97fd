"""When memory for the next adapter is made ready: after one was loaded, as long as nobody misses it."""

import asyncio
import logging
import weakref
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from luthier.modeling.packed_memory import SpareMemory

_LOG = logging.getLogger(__name__)

# So long the request that an adapter was loaded for has the processor for itself.
_DELAY_SECONDS = 0.05


class Spares:
    """The spare memories of all bases, of which one is prepared at a time.

    Args:
        reserving: entered while so many bytes more are taken; tells whether there is room for them.
    """

    def __init__(self, reserving: Callable[[int], AbstractAsyncContextManager[bool]]) -> None:
        self._reserving = reserving
        self._held: weakref.WeakSet[SpareMemory] = weakref.WeakSet()
        self._preparing: asyncio.Task[None] | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes that are spare now."""
        return sum(spare.num_bytes for spare in self._held)

    def prepare_soon(self, spare: SpareMemory) -> None:
        """Have memory ready for adapters as large as the last one."""
        if self._preparing is None or self._preparing.done():
            self._held.add(spare)
            self._preparing = asyncio.ensure_future(self._prepare(spare))

    def drop(self) -> int:
        """Give all of them back, and tell how many bytes they were."""
        num_bytes = self.num_bytes
        for spare in self._held:
            spare.drop()
        return num_bytes

    async def _prepare(self, spare: SpareMemory) -> None:
        await asyncio.sleep(_DELAY_SECONDS)
        has_more = True
        while has_more and spare.is_missing:
            async with self._reserving(spare.wanted_bytes) as has_room:
                try:
                    has_more = has_room and await asyncio.to_thread(spare.prepare)
                except OSError as error:
                    _LOG.warning("The system has no memory for the next adapter yet: %s.", error)
                    return
