"""When memory for the next adapter is made ready: after one was loaded, as long as nobody misses it."""

import asyncio
import os
import threading
import weakref
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

from luthier.modeling.packed_memory import SpareMemory

# So long the request that an adapter was loaded for, and the next ones, have the processor for themselves.
_DELAY_SECONDS = 0.05


class Spares:
    """The spare memories of all bases, which one thread prepares while the processor has nothing to do."""

    def __init__(self) -> None:
        self._held: weakref.WeakSet[SpareMemory] = weakref.WeakSet()
        self._preparing: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="spare", initializer=_give_way)

    def prepare_soon(self, spare: SpareMemory, has_room: Callable[[int], Awaitable[bool]]) -> None:
        """Have memory ready for an adapter as large as the last one.

        Args:
            spare: the base's.
            has_room: tells whether so many bytes more may be taken.
        """
        if self._preparing is None or self._preparing.done():
            self._held.add(spare)
            self._preparing = asyncio.ensure_future(self._prepare(spare, has_room))

    def drop(self) -> bool:
        """Give all of them back, and tell whether there were any."""
        found = [spare for spare in self._held if spare.num_bytes]
        for spare in found:
            spare.drop()
        return bool(found)

    async def _prepare(self, spare: SpareMemory, has_room: Callable[[int], Awaitable[bool]]) -> None:
        await asyncio.sleep(_DELAY_SECONDS)
        if await has_room(spare.wanted_bytes):
            await asyncio.get_running_loop().run_in_executor(self._thread, spare.prepare)


def _give_way() -> None:
    """Let every other thread run before this one."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
