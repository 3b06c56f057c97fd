"""What tests of the CPU accelerator share."""

from collections.abc import Iterator

import pytest
import torch

from tests.tiny_methods import Bench
from tests.tiny_shapes import SHAPES, build_shape


@pytest.fixture(params=[1, 2, 5])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Let a test run on each of some numbers of threads, the last more than there are processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    """Every tiny base on disk."""
    folder = tmp_path_factory.mktemp("shapes")
    return Bench({name: build_shape(folder / name, name) for name in SHAPES})
