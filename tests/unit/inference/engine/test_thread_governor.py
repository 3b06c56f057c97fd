"""How many threads steps run on beside other processes."""

import itertools
import threading
import time
from pathlib import Path

import pytest

from luthier.inference.engine.engine import ThreadGovernor, Waited, read_waits


class _Machine:
    """A process of two threads that step, and one that sleeps; `share` of their time they wait."""

    def __init__(self) -> None:
        self.clock, self.ran, self.waited = 100.0, 0.0, 0.0

    def read(self) -> dict[str, Waited]:
        own = Waited(self.ran, self.waited)
        # What waits long and hardly ever works says nothing of steps.
        return {"1": own, "2": own, "3": Waited(0.0, self.waited / 10)}

    def work(self, governor: ThreadGovernor, seconds: float, share: float) -> list[int]:
        """Run steps of 10 ms; return the numbers of threads that they ran on, without repetitions."""
        seen = [governor.num_threads]
        for _ in range(round(seconds / 0.01)):
            self.clock += 0.01
            self.ran, self.waited = self.ran + 0.01 * (1 - share), self.waited + 0.01 * share
            governor.note(0.01)
            if governor.num_threads != seen[-1]:
                seen.append(governor.num_threads)
        return seen


def _govern(machine: _Machine, num_threads: int) -> ThreadGovernor:
    return ThreadGovernor(num_threads, machine.read, lambda: machine.clock)


@pytest.mark.parametrize(
    ("num_threads", "phases"),
    [
        # Some waiting is less than what fewer threads cost.
        (4, [(5, 0.05, [4]), (5, 0.3, [4])]),
        (4, [(3, 0.8, [4, 2, 1]), (40, 0.25, [1]), (40, 0.0, [1, 2, 4])]),
        # One thread is never looked at.
        (1, [(5, 0.9, [1])]),
    ],
)
def test_threads_that_wait_for_processors_become_fewer_and_come_back(num_threads, phases):
    machine = _Machine()
    governor = _govern(machine, num_threads)
    for seconds, share, expected in phases:
        assert machine.work(governor, seconds, share) == expected


def test_what_fails_again_and_again_is_tried_more_and_more_seldom():
    machine = _Machine()
    governor = _govern(machine, 2)
    changes = []
    for _ in range(6000):
        # Two threads wait, one does not.
        before = governor.num_threads
        machine.work(governor, 0.01, share=0.8 if before == 2 else 0.0)
        if governor.num_threads != before:
            changes.append((machine.clock, governor.num_threads))
    tries = [at for at, num_threads in changes if num_threads == 2]
    gaps = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert gaps == sorted(gaps)
    assert gaps[0] < 3
    assert 15 < gaps[-1] < 18


def test_a_system_without_measurements_changes_nothing():
    governor = ThreadGovernor(2, dict, lambda: 0.0)
    for _ in range(100):
        governor.note(1.0)
    assert governor.num_threads == 2


@pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="the system keeps no account")
def test_the_system_measures_what_a_thread_ran():
    name = str(threading.get_native_id())
    before, end = read_waits()[name], time.thread_time() + 0.05
    while time.thread_time() < end:
        pass
    after = read_waits()[name]
    assert after.ran - before.ran >= 0.04
    assert after.waited >= before.waited
