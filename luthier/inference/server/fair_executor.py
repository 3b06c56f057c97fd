"""Threads for work that a request may make long, of which a project has one at a time."""

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar
from weakref import WeakValueDictionary

ResultT = TypeVar("ResultT")

# The threads of a step wait for each other, and so for one whose processor another thread has.
_NICENESS = 10


def _yield_processor() -> None:
    # On Linux niceness is a thread's own (sched(7)); 0 is the calling one.
    os.setpriority(os.PRIO_PROCESS, 0, max(_NICENESS, os.getpriority(os.PRIO_PROCESS, 0)))


class FairExecutor:
    """Runs functions in threads of its own, of low priority. For one event loop."""

    def __init__(self, num_threads: int, name: str) -> None:
        self._threads = ThreadPoolExecutor(num_threads, name, initializer=_yield_processor)
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
