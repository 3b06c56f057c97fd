"""Spare memory for adapters: taken by those that it fits, once, and given back when asked."""

import pytest
import torch

from luthier.modeling import packed_memory
from luthier.modeling.packed_memory import SpareMemory

MIB = 1 << 20


@pytest.fixture(autouse=True)
def _no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_memory, "_REST_SECONDS", 0.0)


def test_memory_is_there_whether_any_is_spare_or_not() -> None:
    spare = SpareMemory()
    first = spare.take(3 * MIB)
    assert (first.shape, first.dtype, first.data_ptr() % 64) == ((3 * MIB,), torch.uint8, 0)
    assert spare.num_bytes == 0


def test_what_is_prepared_is_as_large_as_the_last_and_each_piece_is_taken_once() -> None:
    spare = SpareMemory()
    assert not spare.prepare()
    first = spare.take(3 * MIB)
    assert spare.prepare()
    assert spare.num_bytes == 3 * MIB
    [held] = spare._pieces
    # A little smaller is as good.
    second = spare.take(3 * MIB - 64)
    assert (second.data_ptr(), len(second)) == (held.data_ptr(), 3 * MIB - 64)
    assert spare.num_bytes == 0
    third = spare.take(3 * MIB)
    assert len({one.data_ptr() for one in (first, second, third)}) == 3


@pytest.mark.parametrize(("num_bytes", "num_pieces"), [(2 * MIB, 4), (24 * MIB, 2), (64 * MIB, 1)])
def test_there_are_a_few_pieces_and_fewer_of_large_ones(num_bytes: int, num_pieces: int) -> None:
    spare = SpareMemory()
    # Those that are there are not touched.
    spare.wanted_bytes = num_bytes
    spare._pieces = [torch.empty(num_bytes, dtype=torch.uint8)] * (num_pieces - 1)
    assert spare.prepare()
    assert len(spare._pieces) == num_pieces
    assert not spare.prepare()
    assert len(spare._pieces) == num_pieces


def test_none_is_prepared_for_what_is_very_large() -> None:
    spare = SpareMemory()
    spare.wanted_bytes = 65 * MIB
    assert not spare.prepare()
    assert spare.num_bytes == 0


def test_what_is_dropped_while_it_is_prepared_is_gone_too(monkeypatch: pytest.MonkeyPatch) -> None:
    spare, seen = SpareMemory(), []
    spare.take(8 * MIB)

    def drop(_seconds: float) -> None:
        seen.append(spare.num_bytes)
        spare.drop()

    monkeypatch.setattr(packed_memory.time, "sleep", drop)
    assert not spare.prepare()
    # It counts from its beginning, and goes no further than to the next rest.
    assert seen == [8 * MIB]
    assert spare.num_bytes == 0


def test_what_is_no_longer_wanted_when_it_is_ready_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    spare = SpareMemory()
    spare.take(8 * MIB)
    monkeypatch.setattr(packed_memory.time, "sleep", lambda _: spare.take(6 * MIB))
    assert not spare.prepare()
    assert (spare.num_bytes, spare.wanted_bytes) == (0, 6 * MIB)


def test_memory_of_another_size_is_left_alone_until_the_next_is_prepared() -> None:
    spare = SpareMemory()
    spare.take(3 * MIB)
    spare.prepare()
    assert len(spare.take(2 * MIB)) == 2 * MIB
    assert len(spare.take(4 * MIB)) == 4 * MIB
    assert spare.num_bytes == 3 * MIB
    spare.prepare()
    assert spare.num_bytes == 4 * MIB


def test_little_is_not_prepared_and_what_is_dropped_is_gone() -> None:
    spare = SpareMemory()
    spare.take(MIB // 2)
    assert not spare.prepare()
    assert spare.num_bytes == 0
    spare.take(3 * MIB)
    spare.prepare()
    spare.drop()
    assert spare.num_bytes == 0
