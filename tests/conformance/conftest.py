"""The tiny bases that the methods are tried on, and one thread: sums in one order, like times everywhere."""

from collections.abc import Iterator

import pytest
import torch

from tests.tiny_methods import Bench
from tests.tiny_shapes import SHAPES, build_shape


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("shapes")
    return Bench({name: build_shape(folder / name, name) for name in SHAPES})
