"""What tests of models share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=[1, 2, 5])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """Let a test run on each of some numbers of threads, the last more than there are processors."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
