"""What this process may hold of its device's memory, and what of that it lends to jobs.

Unused pages of keys and values make room for what is loaded, and are lent; then idle artifacts and
bases leave (adapter_cache.py); what answers need, never. Runs on the event loop; blocks are touched on the
engine's thread alone.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import torch

from luthier.core.errors import OutOfMemoryError
from luthier.core.inference import LoanRequest
from luthier.core.runtime import give_back_freed_memory
from luthier.inference.engine.step import BatchExecutor

# What a process takes of a GPU beside its tensors.
_CUDA_CONTEXT_BYTES = 500_000_000


class NoRoomError(OutOfMemoryError):
    """A model for which there is no memory now; later there may be."""

    http_status = 503
    retryable = True


class BlockMemory:
    """Blocks that were never used have no memory yet, unless the runner allocates all at once."""

    def __init__(self, executor: BatchExecutor) -> None:
        self._runner, self._pool = executor.runner, executor.scheduler.pool
        self._limits = limits = executor.runner.limits
        # Without these an answer of any length might fail.
        self._num_least = min(limits.num_blocks, -(-limits.context_length // limits.block_size) + 1)

    @property
    def growing_bytes(self) -> int:
        """Memory of blocks that have none yet and may take some."""
        return 0 if self._limits.allocates_at_once else self._pool.num_growing * self._limits.block_bytes

    @property
    def spare_bytes(self) -> int:
        """Memory of unused blocks, and of growth, beyond what one answer of full length needs."""
        if self._limits.allocates_at_once:
            return 0
        num_used = self._pool.num_warm - self._pool.num_unused
        num_spare = min(self._pool.num_free, self._pool.num_free + num_used - self._num_least)
        return max(0, num_spare) * self._limits.block_bytes

    def limit(self, num_bytes: int) -> None:
        """Limit the memory of unused blocks, beside what one answer of full length needs."""
        if self._limits.allocates_at_once:
            return
        num_used = self._pool.num_warm - self._pool.num_unused
        num_blocks = max(num_used, self._num_least) + num_bytes // self._limits.block_bytes
        self._runner.discard_blocks(self._pool.limit_warm(num_blocks))


class MemoryLimit:
    """How much this process may hold, how much it does, and what it has lent.

    Args:
        max_bytes: its part of the device.
        measure: returns the bytes that the process has of the device.
        trim: gives back what was freed, which allocators may keep.
        now: seconds on a clock that never goes back.
    """

    def __init__(
        self,
        max_bytes: int,
        call: Callable[[Callable[[], None]], "Future[None]"],
        memories: Callable[[], list[BlockMemory]],
        measure: Callable[[], int],
        trim: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._call, self._memories, self._measure, self._now = call, memories, measure, now
        self.trim = trim
        self._own_bytes = max_bytes
        # Bytes and the moment at which they come back, by id.
        self._loans: dict[str, tuple[int, float]] = {}

    @property
    def max_bytes(self) -> int:
        """What the process may hold now."""
        self._loans = {name: loan for name, loan in self._loans.items() if loan[1] > self._now()}
        return self._own_bytes - sum(num_bytes for num_bytes, _ in self._loans.values())

    async def lend(self, asked: LoanRequest, loading_bytes: int) -> int:
        """Lend what pages can give up; it replaces what the loan was before.

        Args:
            loading_bytes: what is on its way to the memory.

        Returns:
            The bytes that are lent; 0 where they are fewer than the job can use.
        """
        self._loans.pop(asked.loan_id, None)
        spare_bytes = sum(one.spare_bytes for one in self._memories())
        num_bytes = min(asked.num_bytes, spare_bytes - self._missing(loading_bytes))
        if num_bytes > 0 and num_bytes >= asked.least_bytes:
            self._loans[asked.loan_id] = (num_bytes, self._now() + asked.seconds)
        missing = await self.fit(loading_bytes)
        if missing > 0 and asked.loan_id in self._loans:
            # Answers took pages meanwhile.
            less = asked.model_copy(update={"num_bytes": max(0, num_bytes - missing)})
            return await self.lend(less, loading_bytes)
        return self._loans.get(asked.loan_id, (0, 0.0))[0]

    async def fit(self, num_bytes: int) -> int:
        """Shrink pages until `num_bytes` more stay below the limit, or as far as they can.

        Returns:
            The bytes by which it would still be too much; none or below where it fits.
        """
        await asyncio.wrap_future(self.limit_pages(num_bytes))
        if self._missing(num_bytes) > 0:
            await asyncio.to_thread(self.trim)
        return self._missing(num_bytes)

    def limit_pages(self, num_bytes: int) -> "Future[None]":
        """Do as `fit` does, by pages alone and without waiting for the step that runs."""
        left = self.max_bytes - self._measure() - num_bytes
        return self._call(lambda: self._limit_pages(left))

    def _missing(self, num_bytes: int) -> int:
        growing_bytes = sum(one.growing_bytes for one in self._memories())
        return self._measure() + growing_bytes + num_bytes - self.max_bytes

    def _limit_pages(self, left_bytes: int) -> None:
        """Let block memories grow by equal parts of what is left, or shrink in order by what is missing."""
        memories = self._memories()
        missing_bytes = max(0, -left_bytes)
        for one in memories:
            warm_bytes = one.spare_bytes - one.growing_bytes
            taken_bytes = min(max(0, warm_bytes), missing_bytes)
            missing_bytes -= taken_bytes
            one.limit(max(0, warm_bytes - taken_bytes + max(0, left_bytes) // len(memories)))


def measure_used(device: torch.device) -> int:
    """Return the bytes of a device's memory that this process has; files it has mapped don't count."""
    if device.type != "cpu":
        return int(torch.cuda.memory_reserved(device)) + _CUDA_CONTEXT_BYTES
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def trim(device: torch.device) -> None:
    """Give freed memory back, of which allocators keep some."""
    if device.type != "cpu":
        torch.cuda.empty_cache()
        return
    give_back_freed_memory()
