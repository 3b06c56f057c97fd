"""Memory that is made ready ahead of its need."""

import time

import pytest
import torch

from luthier.modeling.kernels import page_memory
from luthier.modeling.kernels.page_memory import RoomAhead


def _wait_until_ready(rooms: RoomAhead, num_bytes: int) -> None:
    deadline = time.monotonic() + 10
    while rooms._ready is None or len(rooms._ready) != num_bytes:
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("num_bytes", [4096, 5 << 20])
def test_a_second_piece_of_one_size_is_ready_and_nobody_elses(num_bytes: int) -> None:
    rooms = RoomAhead()
    first = rooms.take(num_bytes)
    first.fill_(7)
    _wait_until_ready(rooms, num_bytes)
    ready = rooms._ready
    assert ready is not None
    second = rooms.take(num_bytes)
    assert second.data_ptr() == ready.data_ptr() != first.data_ptr()
    assert len(second) == num_bytes
    assert second.data_ptr() % 64 == 0
    assert bool((first == 7).all())


def test_a_piece_of_another_size_is_taken_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms = RoomAhead()
    rooms.take(4096)
    _wait_until_ready(rooms, 4096)
    assert len(rooms.take(8192)) == 8192
    _wait_until_ready(rooms, 8192)
    # What is too large is not kept ready.
    monkeypatch.setattr(page_memory, "_MOST_AHEAD", 1000)
    rooms.take(4096)
    assert rooms._ready is None
    assert isinstance(rooms.take(4096), torch.Tensor)
