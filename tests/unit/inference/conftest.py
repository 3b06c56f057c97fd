"""The base of the inference server's tests, on one thread, so that sums of floats are in one order."""

from pathlib import Path

import pytest
import torch

from tests.tiny import BASE_ID


@pytest.fixture(scope="session")
def base_folder(tiny_base: Path) -> Path:
    """The tiny base, to be read only."""
    torch.set_num_threads(1)
    return tiny_base / BASE_ID


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"
