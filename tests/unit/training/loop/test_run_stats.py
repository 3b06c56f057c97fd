"""Sums over attempts."""

import pytest

from luthier.core.events import PhaseSeconds
from luthier.training.loop.run_stats import Progress


class Clock:
    """Seconds that only the test moves."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_sums_go_on_from_those_of_the_attempt_before() -> None:
    clock = Clock()
    ledger = Progress(
        seconds=PhaseSeconds(load=1.0, train=10.0),
        tokens_seen=100,
        supervised_tokens_seen=40,
        peak_memory_bytes=2**60,
    )
    ledger.add_seconds("load", 2.0)
    with ledger.phase("train", clock):
        clock.now = 5.0
    ledger.tokens_seen += 50
    ledger.supervised_tokens_seen += 20
    ledger.note_memory("cpu")
    assert ledger.seconds == PhaseSeconds(load=3.0, train=15.0)
    assert (ledger.tokens_seen, ledger.supervised_tokens_seen) == (150, 60)
    assert ledger.tokens_per_second == 10.0
    assert ledger.peak_memory_bytes == 2**60


def test_the_time_of_what_failed_counts_too() -> None:
    clock = Clock()
    ledger = Progress()
    with pytest.raises(ValueError, match="no"), ledger.phase("evaluate", clock):
        clock.now = 3.0
        raise ValueError("no")
    assert ledger.seconds == PhaseSeconds(evaluate=3.0)
    assert ledger.tokens_per_second is None
