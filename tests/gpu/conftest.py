"""Every promise of this folder is checked on the CPU, and on a CUDA device where there is one."""

from collections.abc import Iterator

import pytest
import torch

_DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="there is no CUDA device"))


@pytest.fixture(params=_DEVICES)
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A kind of device. A run on the CPU makes this process deterministic, which CUDA is not asked to be."""
    torch.use_deterministic_algorithms(False)
    yield request.param
    torch.use_deterministic_algorithms(False)
