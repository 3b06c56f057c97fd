"""The memory limit of the inference server: what makes room and is lent, and what never is."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future

import pytest
import torch

from luthier.core.inference import LoanRequest
from luthier.inference.engine.block_pool import BlockPool, BlockTable
from luthier.inference.models.memory_limit import MemoryLimit, measure_used
from luthier_cpu.codegen.page_memory import discard


class FakeMemory:
    """Pages in use, unused pages, and pages without memory, as bytes."""

    def __init__(self, *, used: int, unused: int, cold: int, least: int = 0) -> None:
        self.used, self.unused, self.cold, self.least = used, unused, cold, least
        self.bound = used + unused + cold

    @property
    def growing_bytes(self) -> int:
        return max(0, min(self.cold, self.bound - self.used - self.unused))

    @property
    def spare_bytes(self) -> int:
        return self.unused + self.growing_bytes - max(0, self.least - self.used)

    def limit(self, num_bytes: int) -> None:
        self.bound = min(max(self.used, self.least) + num_bytes, self.used + self.unused + self.cold)
        dropped = max(0, min(self.unused, self.used + self.unused - self.bound))
        self.unused, self.cold = self.unused - dropped, self.cold + dropped


class Process:
    """A process of fixed weights and some memories, at a time that the test sets."""

    def __init__(self, *memories: FakeMemory, max_bytes: int = 1000, weights: int = 100) -> None:
        self.memories, self.weights, self.now = memories, weights, 0.0
        self.limit = MemoryLimit(
            max_bytes,
            self._call,
            lambda: list(self.memories),
            measure=lambda: self.used,
            now=lambda: self.now,
        )

    @property
    def used(self) -> int:
        return self.weights + sum(memory.used + memory.unused for memory in self.memories)

    @staticmethod
    def _call(work: Callable[[], None]) -> "Future[None]":
        work()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def fit(self, num_bytes: int = 0) -> int:
        return asyncio.run(self.limit.fit(num_bytes))

    def lend(self, num_bytes: int, least_bytes: int = 1, loan_id: str = "a") -> int:
        asked = LoanRequest(
            hostname=None,
            device="cpu",
            loan_id=loan_id,
            num_bytes=num_bytes,
            least_bytes=least_bytes,
            seconds=10,
        )
        return asyncio.run(self.limit.lend(asked, 0))


def test_pages_that_were_never_used_are_given_up_first_then_unused_ones():
    memory = FakeMemory(used=10, unused=20, cold=70)
    process = Process(memory, max_bytes=200)
    assert process.fit(50) == 0
    assert (memory.unused, memory.growing_bytes) == (20, 20)
    assert process.fit(80) == 0
    assert (memory.unused, memory.growing_bytes) == (10, 0)
    # What answers use stays.
    assert process.fit(150) == 60
    assert (memory.used, memory.unused, memory.growing_bytes) == (10, 0, 0)
    assert process.fit() == 0
    assert memory.growing_bytes == 90


def test_one_long_answer_can_always_be_given():
    memory = FakeMemory(used=10, unused=0, cold=90, least=40)
    process = Process(memory, max_bytes=110)
    assert process.fit() == 30
    assert memory.growing_bytes == 30
    assert memory.spare_bytes == 0
    assert process.lend(50) == 0


def test_what_is_missing_is_taken_of_one_runner_after_the_other():
    first, second = FakeMemory(used=0, unused=10, cold=0), FakeMemory(used=0, unused=50, cold=0)
    assert Process(first, second, max_bytes=125).fit() == 0
    assert (first.unused, second.unused) == (0, 25)


def test_pages_are_lent_until_the_loan_is_given_back_or_lapses_and_never_taken_meanwhile():
    memory = FakeMemory(used=10, unused=20, cold=70)
    process = Process(memory, max_bytes=200)
    assert process.lend(60) == 60
    # Whatever is asked for: the process and what it lent stay below its part together.
    assert process.used + memory.growing_bytes + 60 <= 200
    assert process.fit(50) == 20
    assert process.lend(60) == 60
    assert process.lend(0, 0) == 0
    assert process.fit() == 0
    assert memory.growing_bytes == 90
    assert process.lend(30) == 30
    process.now = 10.0
    assert process.fit() == 0
    assert memory.growing_bytes == 90


def test_no_more_is_lent_than_is_unused_and_nothing_where_that_is_too_little():
    memory = FakeMemory(used=10, unused=20, cold=70)
    process = Process(memory, max_bytes=200)
    assert process.lend(95, 95) == 0
    assert (memory.unused, memory.growing_bytes) == (20, 70)
    assert process.lend(50) == 50
    assert process.lend(95, 1, "b") == 40
    assert (memory.used, memory.unused, memory.growing_bytes) == (10, 0, 0)


def test_pages_without_memory_are_taken_last_and_not_beyond_the_limit():
    pool = BlockPool(6, block_size=4)
    one, two = BlockTable(None), BlockTable(None)
    assert pool.extend(one, 12)
    assert (one.blocks, pool.num_warm, pool.num_growing) == ([0, 1, 2], 3, 3)
    assert pool.limit_warm(4) == []
    assert (pool.num_free, pool.num_growing) == (1, 1)
    assert not pool.extend(two, 8)
    assert pool.extend(two, 4)
    pool.release(one)
    assert len(pool.limit_warm(2)) == 2
    assert (pool.num_warm, pool.num_free) == (2, 1)
    pool.limit_warm(100)
    assert pool.num_free == 5


def test_what_is_known_of_a_page_goes_with_its_memory():
    pool = BlockPool(4, block_size=2)
    table = pool.start("a", [1, 2, 3, 4, 5])
    assert pool.extend(table, 5)
    pool.cache_full_blocks(table, [1, 2, 3, 4, 5], 5)
    pool.release(table)
    again = pool.start("a", [1, 2, 3, 4, 5])
    assert len(again.blocks) == 2
    pool.release(again)
    pool.limit_warm(0)
    assert pool.start("a", [1, 2, 3, 4, 5]).blocks == []


def test_discarded_pages_lose_their_memory_and_others_keep_their_numbers():
    whole = torch.ones(2, 256, 16384)
    before = measure_used(whole.device)
    discard(whole, [*range(1, 200), 250])
    assert before - measure_used(whole.device) > 15_000_000
    kept = [0, *range(200, 250), *range(251, 256)]
    assert bool((whole[:, kept] == 1).all())
    assert float(whole[:, 100].sum()) == 0


@pytest.mark.parametrize("pages", [[], [3], [0, 1, 2]])
def test_discarding_small_pages_harms_no_neighbour(pages):
    whole = torch.ones(3, 5, 7)
    discard(whole, pages)
    assert bool((whole[:, [page for page in range(5) if page not in pages]] == 1).all())
