"""How long text of a stream may wait for more."""

import pytest

from luthier.inference.pace import Pace


@pytest.mark.parametrize(
    ("num_rows", "events_per_second", "gap_seconds"),
    [
        # Few streams, or each token by itself: at once.
        (1, 600, 0.0),
        (2, 600, 0.0),
        (64, 0, 0.0),
        # Many: all of them together so often.
        (16, 600, 16 / 600),
        (6, 600, 0.01),
        # Never so rarely that text jumps.
        (256, 600, 0.05),
    ],
)
def test_a_gap_grows_with_the_streams_and_has_an_end(
    num_rows: int, events_per_second: int, gap_seconds: float
) -> None:
    assert Pace(events_per_second).gap_seconds(num_rows) == pytest.approx(gap_seconds)
