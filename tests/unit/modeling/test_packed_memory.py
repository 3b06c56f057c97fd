"""Spare memory for adapters: taken by those that it fits, once, and given back when asked."""

import torch

from luthier.modeling.packed_memory import SpareMemory

MIB = 1 << 20


def test_memory_is_there_whether_any_is_spare_or_not() -> None:
    spare = SpareMemory()
    first = spare.take(3 * MIB)
    assert (first.shape, first.dtype, first.data_ptr() % 64) == ((3 * MIB,), torch.uint8, 0)
    assert spare.num_bytes == 0


def test_what_is_prepared_is_as_large_as_the_last_and_is_taken_once() -> None:
    spare = SpareMemory()
    spare.prepare()
    assert spare.num_bytes == 0
    first = spare.take(3 * MIB)
    spare.prepare()
    assert spare.num_bytes == 3 * MIB
    held = spare._spare
    assert held is not None
    spare.prepare()
    assert spare._spare is held
    # A little smaller is as good.
    second = spare.take(3 * MIB - 64)
    assert (second.data_ptr(), len(second)) == (held.data_ptr(), 3 * MIB - 64)
    assert spare.num_bytes == 0
    third = spare.take(3 * MIB)
    assert len({one.data_ptr() for one in (first, second, third)}) == 3


def test_memory_of_another_size_is_left_alone() -> None:
    spare = SpareMemory()
    spare.take(3 * MIB)
    spare.prepare()
    assert len(spare.take(2 * MIB)) == 2 * MIB
    assert len(spare.take(4 * MIB)) == 4 * MIB
    assert spare.num_bytes == 3 * MIB
    # The next one is prepared for the last.
    spare.prepare()
    assert spare.num_bytes == 4 * MIB


def test_little_is_not_prepared_and_what_is_dropped_is_gone() -> None:
    spare = SpareMemory()
    spare.take(MIB // 2)
    spare.prepare()
    assert spare.num_bytes == 0
    spare.take(3 * MIB)
    spare.prepare()
    spare.drop()
    assert spare.num_bytes == 0
