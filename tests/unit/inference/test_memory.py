"""The ceiling of the inference server: what is given back, in which order, and what never is."""

import asyncio
from collections.abc import Callable
from concurrent.futures import Future

import pytest
import torch

from luthier.core.inference import MemoryOrder
from luthier.inference.memory import Ceiling, measure_used
from luthier.inference.pages import Chain, PagePool
from luthier.modeling.kernels.page_memory import discard


class FakeLane:
    """Pages in use, pages that nobody uses, and pages without memory, as bytes."""

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
    """A process of fixed weights and some lanes, at a time that the test sets."""

    def __init__(self, *lanes: FakeLane, weights: int = 100) -> None:
        self.lanes, self.weights, self.now = lanes, weights, 0.0
        self.ceiling = Ceiling(
            self._call,
            lambda: list(self.lanes),
            measure=lambda: self.weights + sum(lane.used + lane.unused for lane in self.lanes),
            now=lambda: self.now,
        )

    @staticmethod
    def _call(work: Callable[[], None]) -> "Future[None]":
        work()
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def obey(self, version: int, max_bytes: int, num_bytes: int = 0) -> int:
        self.ceiling.take(MemoryOrder(version=version, max_bytes=max_bytes, seconds=10))
        return asyncio.run(self.ceiling.fit(num_bytes))


def test_pages_that_were_never_used_are_given_up_first_then_those_that_nobody_uses() -> None:
    lane = FakeLane(used=10, unused=20, cold=70)
    process = Process(lane)
    assert process.obey(1, 150) == 0
    assert (lane.unused, lane.growing_bytes) == (20, 20)
    assert process.obey(2, 120) == 0
    assert (lane.unused, lane.growing_bytes) == (10, 0)
    # What answers use stays.
    assert process.obey(3, 50) == 60
    assert (lane.used, lane.unused, lane.growing_bytes) == (10, 0, 0)
    assert process.obey(4, 1000) < 0
    assert lane.growing_bytes == 90


def test_one_long_answer_can_always_be_given() -> None:
    lane = FakeLane(used=10, unused=0, cold=90, least=40)
    process = Process(lane)
    assert process.obey(1, 110) == 30
    assert lane.growing_bytes == 30
    assert process.ceiling.spare_bytes == 0


def test_what_is_missing_is_taken_of_one_lane_after_the_other() -> None:
    first, second = FakeLane(used=0, unused=10, cold=0), FakeLane(used=0, unused=50, cold=0)
    assert Process(first, second).obey(1, 125) == 0
    assert (first.unused, second.unused) == (0, 25)


def test_an_older_order_that_comes_late_changes_nothing_and_a_ceiling_lapses() -> None:
    lane = FakeLane(used=10, unused=0, cold=90)
    process = Process(lane)
    process.obey(5, 120)
    assert process.obey(4, 200) == 0
    assert (process.ceiling.version, lane.growing_bytes) == (5, 10)
    process.now = 10.0
    assert not process.ceiling.is_set
    assert asyncio.run(process.ceiling.fit(10**6)) == 0
    assert lane.growing_bytes == 90


def test_pages_without_memory_are_taken_last_and_not_beyond_the_limit() -> None:
    pool = PagePool(6, page_size=4)
    one, two = Chain(None), Chain(None)
    assert pool.extend(one, 12)
    assert (one.pages, pool.num_warm, pool.num_growing) == ([0, 1, 2], 3, 3)
    assert pool.limit_warm(4) == []
    assert (pool.num_free, pool.num_growing) == (1, 1)
    assert not pool.extend(two, 8)
    assert pool.extend(two, 4)
    pool.release(one)
    assert len(pool.limit_warm(2)) == 2
    assert (pool.num_warm, pool.num_free) == (2, 1)
    pool.limit_warm(100)
    assert pool.num_free == 5


def test_what_is_known_of_a_page_goes_with_its_memory() -> None:
    pool = PagePool(4, page_size=2)
    chain = pool.start("a", [1, 2, 3, 4, 5])
    assert pool.extend(chain, 5)
    pool.name(chain, [1, 2, 3, 4, 5], 5)
    pool.release(chain)
    again = pool.start("a", [1, 2, 3, 4, 5])
    assert len(again.pages) == 2
    pool.release(again)
    pool.limit_warm(0)
    assert pool.start("a", [1, 2, 3, 4, 5]).pages == []


def test_discarded_pages_lose_their_memory_and_others_keep_their_numbers() -> None:
    whole = torch.ones(2, 256, 16384)
    before = measure_used(whole.device)
    discard(whole, [*range(1, 200), 250])
    assert before - measure_used(whole.device) > 15_000_000
    kept = [0, *range(200, 250), *range(251, 256)]
    assert bool((whole[:, kept] == 1).all())
    assert float(whole[:, 100].sum()) == 0


@pytest.mark.parametrize("pages", [[], [3], [0, 1, 2]])
def test_discarding_small_pages_harms_no_neighbour(pages: list[int]) -> None:
    whole = torch.ones(3, 5, 7)
    discard(whole, pages)
    assert bool((whole[:, [page for page in range(5) if page not in pages]] == 1).all())
