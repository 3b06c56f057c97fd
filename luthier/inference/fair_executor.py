"""Threads for work that a request may make long, of which a project has one at a time."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakValueDictionary

ResultT = TypeVar("ResultT")


class FairExecutor:
    """Runs functions in threads of its own. For one event loop."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(num_threads, name)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def run(self, project_id: str, work: Callable[[], ResultT]) -> ResultT:
        """Run a function when the project's earlier one has ended.

        A caller that is cancelled leaves; work that has begun keeps its project's place until it ends.
        """
        lock = self._locks.setdefault(project_id, asyncio.Lock())
        await lock.acquire()
        future = self._threads.submit(work)
        running = asyncio.wrap_future(future)
        running.add_done_callback(lambda _: lock.release())
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            # Without effect on work that has begun.
            future.cancel()
            raise
