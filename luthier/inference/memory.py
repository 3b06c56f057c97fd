"""What this process holds of its device's memory, and the ceiling that a worker may set on it.

The ceiling comes from the ledger in the database, which this process knows nothing of. Pages of keys and
values that nobody uses are given back first, then idle artifacts (loaded.py); what answers need, never.
Runs on the event loop; lanes are touched on the engine's thread alone.
"""

import asyncio
import os
import secrets
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Protocol

import torch

from luthier.core.allocator import give_back_freed_memory
from luthier.core.devices import find_device
from luthier.core.errors import OutOfMemoryError
from luthier.core.inference import MemoryOrder
from luthier.core.settings import Settings

# What a process takes of a GPU beside its tensors.
_CUDA_CONTEXT_BYTES = 500_000_000


class NoRoomError(OutOfMemoryError):
    """A model for which there is no memory while jobs are training; later there may be."""

    http_status = 503
    retryable = True


class LaneMemoryLike(Protocol):
    """What the ceiling asks of luthier.inference.lane_memory.LaneMemory."""

    @property
    def growing_bytes(self) -> int:
        """Memory of pages that were never used, and may be."""

    @property
    def spare_bytes(self) -> int:
        """Memory of pages that nobody uses, those that may yet be used included, beyond what it must have."""

    def limit(self, num_bytes: int) -> None:
        """Let pages take no more than so much beside those in use."""


class Ceiling:
    """How much this process may hold, and how much it does.

    Args:
        measure: returns the bytes that the process has of the device.
        trim: gives back what was freed, which allocators may keep.
        now: seconds on a clock that never goes back.
    """

    def __init__(
        self,
        call: Callable[[Callable[[], None]], "Future[None]"],
        lanes: Callable[[], list[LaneMemoryLike]],
        measure: Callable[[], int],
        trim: Callable[[], None] = lambda: None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._call, self._lanes, self._measure, self._now = call, lanes, measure, now
        self.trim = trim
        self.version = 0
        self._max_bytes = 0
        self._until = now()

    @property
    def is_set(self) -> bool:
        """Whether there is a ceiling now."""
        return self._now() < self._until

    def take(self, order: MemoryOrder) -> bool:
        """Take a ceiling over, unless a newer one was told; return whether it was."""
        if order.version <= self.version:
            return False
        self.version, self._max_bytes = order.version, order.max_bytes
        self._until = self._now() + order.seconds
        return True

    @property
    def used_bytes(self) -> int:
        """Bytes that the process has."""
        return self._measure()

    @property
    def growing_bytes(self) -> int:
        """Bytes that pages may come to take without a word."""
        return sum(lane.growing_bytes for lane in self._lanes())

    @property
    def spare_bytes(self) -> int:
        """Bytes that pages would give back."""
        return sum(lane.spare_bytes for lane in self._lanes())

    async def fit(self, num_bytes: int) -> int:
        """Bring pages to where so many more bytes stay below the ceiling, or as near as they can.

        Args:
            num_bytes: what is about to be taken beside what the process has.

        Returns:
            The bytes by which it would still be too much; none or below where it fits.
        """
        if self.version == 0:
            return 0
        if not self.is_set:
            await asyncio.wrap_future(self._call(self._free_pages))
            return 0
        left = self._max_bytes - self.used_bytes - num_bytes
        await asyncio.wrap_future(self._call(lambda: self._limit_pages(left)))
        if self._missing(num_bytes) > 0:
            await asyncio.to_thread(self.trim)
        return self._missing(num_bytes)

    def _missing(self, num_bytes: int) -> int:
        return self.used_bytes + self.growing_bytes + num_bytes - self._max_bytes

    def _free_pages(self) -> None:
        for lane in self._lanes():
            lane.limit(2**62)

    def _limit_pages(self, left_bytes: int) -> None:
        """Let lanes grow by what is left, in equal parts; or take what is missing of one after the other."""
        lanes = self._lanes()
        missing_bytes = max(0, -left_bytes)
        for lane in lanes:
            warm_bytes = lane.spare_bytes - lane.growing_bytes
            taken_bytes = min(max(0, warm_bytes), missing_bytes)
            missing_bytes -= taken_bytes
            lane.limit(max(0, warm_bytes - taken_bytes + max(0, left_bytes) // len(lanes)))


def identify(settings: Settings, device: torch.device) -> tuple[str, str, str]:
    """Return this process's id, its host's name and its device's, as the ledger has them."""
    hostname = socket.gethostname()
    kind = "cpu" if device.type == "cpu" else "cuda"
    found = find_device(settings.model_copy(update={"device": kind}))
    name = found.name if found is not None else "cuda:0"
    return f"{hostname}-{os.getpid()}-{secrets.token_hex(4)}", hostname, name


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
