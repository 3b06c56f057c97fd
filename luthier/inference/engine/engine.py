"""The engine: one thread that schedules, executes, samples and delivers for every runner.

Each runner's sequences run in batches of its executor (step.py); the engine alternates between executors.
Other threads talk to it by a queue, which it sleeps in while it is idle; it answers event loops by a bridge
that wakes each once a step. A governor lowers its number of threads on a crowded machine.
"""

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import torch

from luthier.core.errors import LuthierError, UnavailableError
from luthier.inference.engine.error_reporting import log_fault, to_client_error
from luthier.inference.engine.scheduler import WaitingShares
from luthier.inference.engine.sequence import Sequence
from luthier.inference.engine.step import BatchExecutor, StepMetrics

_LOG = logging.getLogger(__name__)

# How long an idle engine waits for requests that came with the first one and are about to be submitted: a
# step of that one alone would take longer than its share of a step of them all.
_GATHER_SECONDS, _QUIET_SECONDS, _POLL_SECONDS = 0.006, 0.0005, 0.0001
_TASKS = Path("/proc/self/task")
_NANOSECONDS = 1e-9
# Steps are judged together for so long, in seconds: some turns of a scheduler.
_WINDOW_SECONDS = 0.2
# Shares of its time that a thread has waited: above the first fewer threads do more, below the second there
# is room for more of them.
_CROWDED, _ROOMY = 0.35, 0.15
# Fewer threads stay for so long, in seconds; longer each time that more of them failed at once.
_SHORTEST_STAY, _LONGEST_STAY = 1.0, 16.0

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class _Call(Generic[ResultT]):
    """Work for the engine's thread between two steps."""

    work: Callable[[], ResultT]
    future: Future[ResultT] = field(default_factory=Future)

    def run(self) -> None:
        """Do the work and set its result."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            result = self.work()
        except Exception as error:  # noqa: BLE001 - the thread must outlive it; the waiting thread gets it
            if not isinstance(error, LuthierError):
                log_fault(_LOG, "Work between steps", error)
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class Engine:
    """The executors that have work, and the thread that runs their steps.

    `step` and all that it calls run on that thread; a test may call them without it.

    Args:
        max_waiting: sequences that may wait; beyond them a project may have its share of as many.
        on_death: called on the engine's thread when it ends by a fault.
        stall_seconds: a step that lasts longer makes the engine not ready.
        num_threads: that torch uses on this thread; None for what it has.
    """

    def __init__(
        self,
        *,
        max_waiting: int,
        num_threads: int | None = None,
        on_death: Callable[[], None] | None = None,
        stall_seconds: float = math.inf,
    ) -> None:
        self.measures = StepMetrics()
        self.events = EventBridge()
        # Those without work are forgotten, so that a model that leaves frees its memory.
        self._executors: list[BatchExecutor] = []
        self._on_death, self._stall_seconds = on_death, stall_seconds
        # When the work that runs now began; None while there is none.
        self._busy_since: float | None = None
        self._waiting_shares = WaitingShares(max_waiting)
        self._num_threads = num_threads
        # None until the governor changes it.
        self._num_governed_threads: int | None = None
        self._inbox: queue.SimpleQueue[Sequence | _Call[Any] | None] = queue.SimpleQueue()
        self._is_closed, self._num_expected = False, 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs and takes requests."""
        return self._thread.is_alive() and not self._is_closed

    def _check_alive(self) -> None:
        if not self.is_alive:
            raise UnavailableError("The model server is shutting down; try again.")

    @property
    def is_stalled(self) -> bool:
        """Whether a step, or work between two steps, has not ended for too long."""
        busy_since = self._busy_since
        return busy_since is not None and time.monotonic() - busy_since > self._stall_seconds

    @property
    def has_work(self) -> bool:
        """Whether an executor has a sequence that waits or runs."""
        return bool(self._executors)

    @property
    def num_waiting(self) -> int:
        """Sequences that do not run yet."""
        # A copy: another thread may ask.
        waiting = sum(one.scheduler.num_waiting for one in list(self._executors))
        return self._inbox.qsize() + waiting

    @property
    def num_running(self) -> int:
        """Sequences that run."""
        return sum(len(one.scheduler.running) for one in list(self._executors))

    @contextmanager
    def expecting(self) -> Iterator[None]:
        """Announce, on the event loop's thread, a request that will be submitted inside."""
        self._num_expected += 1
        try:
            yield
        finally:
            self._num_expected -= 1

    def submit(self, sequences: list[Sequence]) -> None:
        """Hand over the sequences of one request, all or none.

        Raises:
            TooManyRequestsError: when too many wait already.
            UnavailableError: when the engine is closed; so does `call`.
        """
        self._check_alive()
        self._waiting_shares.take(sequences, self.num_waiting)
        for sequence in sequences:
            self._inbox.put(sequence)

    def call(self, work: Callable[[], ResultT]) -> Future[ResultT]:
        """Run work on the engine's thread between two steps, after all that was submitted before."""
        self._check_alive()
        call = _Call(work)
        self._inbox.put(call)
        return call.future

    def sweep(self) -> Future[None]:
        """Drop finished and cancelled sequences, and the references to weights that they hold."""

        def sweep() -> None:
            for executor in self._executors:
                executor.scheduler.sweep()

        return self.call(sweep)

    def close(self) -> None:
        """Take no more requests and let the thread end after its current step."""
        self._is_closed = True
        self._inbox.put(None)

    def join(self, timeout_seconds: float) -> None:
        """Wait for the thread's end."""
        self._thread.join(timeout_seconds)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence at its model's executor."""
        executor: BatchExecutor = sequence.served.executor
        executor.scheduler.add(sequence)
        if executor not in self._executors:
            executor.measures, executor.on_launch = self.measures, self.events.flush
            if self._num_governed_threads is not None:
                executor.runner.set_num_threads(self._num_governed_threads)
            self._executors.append(executor)

    def step(self) -> bool:
        """Run a batch of every executor that has work; return whether there was one."""
        was_busy = False
        for executor in self._executors:
            try:
                was_busy |= executor.step()
            except torch.AcceleratorError:
                # Every later call of this process would fail with it.
                raise
            except Exception as error:  # noqa: BLE001 - the thread must outlive any fault of one runner
                was_busy = True
                client_error = to_client_error(
                    _LOG, "A batch executor, whose answers all end with an error,", error
                )
                for sequence in executor.scheduler.drain():
                    sequence.fail(client_error)
        self._executors = [one for one in self._executors if one.scheduler.has_work]
        return was_busy

    def _run(self) -> None:
        if self._num_threads is not None:
            # Each thread has a number of its own, which it copies from the last one set when it is first
            # read; so it is read before it is set.
            torch.get_num_threads()
            torch.set_num_threads(self._num_threads)
        governor = ThreadGovernor(torch.get_num_threads())
        is_dead = True
        try:
            while not self._is_closed:
                self._take_inbox()
                started_at = self._busy_since = time.monotonic()
                if not self.step():
                    self.events.flush()
                num_threads = governor.num_threads
                governor.note(time.monotonic() - started_at)
                if governor.num_threads != num_threads:
                    self._num_governed_threads = governor.num_threads
                    for executor in self._executors:
                        executor.runner.set_num_threads(governor.num_threads)
            is_dead = False
        except Exception as error:  # noqa: BLE001 - the process ends with it
            log_fault(_LOG, "The engine's thread, which ends,", error)
        finally:
            # However it ends, no request is left waiting.
            self._is_closed = True
            try:
                self._fail_all()
                self.events.flush()
            finally:
                if is_dead and self._on_death is not None:
                    self._on_death()

    def _fail_all(self) -> None:
        error = UnavailableError("The model server was stopped; try again.")
        for executor in self._executors:
            for sequence in executor.scheduler.drain():
                sequence.fail(error)
        self._executors.clear()
        while not self._inbox.empty():
            item = self._inbox.get()
            if isinstance(item, Sequence):
                item.fail(error)
            elif item is not None and item.future.set_running_or_notify_cancel():
                item.future.set_exception(error)

    def _take_inbox(self) -> None:
        """Move what came in to the scheduler; sleep in the queue while there is nothing to do."""
        ready_at = quiet_at = 0.0
        while not self._is_closed:
            if not self.has_work:
                self.events.flush()
                self._busy_since = None
                item = self._inbox.get()
                self._busy_since = time.monotonic()
                quiet_at = time.monotonic() + _QUIET_SECONDS
                ready_at = time.monotonic() + _GATHER_SECONDS
            elif not self._inbox.empty():
                item = self._inbox.get()
                quiet_at = time.monotonic() + _QUIET_SECONDS
            elif (now := time.monotonic()) < ready_at and (self._num_expected or now < quiet_at):
                # Requests that arrive together run together.
                time.sleep(_POLL_SECONDS)
                continue
            else:
                return
            if isinstance(item, Sequence):
                self.add(item)
            elif item is not None:
                self.events.flush()
                item.run()


_Delivery = tuple[Callable[[Any], None], Any]


class EventBridge:
    """Buffers events until a flush, which wakes each loop once for all of its events. For one thread.

    A loop that is awake takes the interpreter's lock, so the engine flushes when it is about to compute
    without it, or to wait.
    """

    def __init__(self) -> None:
        self._buffered: dict[asyncio.AbstractEventLoop, list[_Delivery]] = {}

    def add(self, loop: asyncio.AbstractEventLoop, deliver: Callable[[Any], None], event: Any) -> None:
        """Buffer an event; the loop will call `deliver` with it, which may not raise."""
        self._buffered.setdefault(loop, []).append((deliver, event))

    def flush(self) -> None:
        """Hand each loop its buffered events."""
        while self._buffered:
            loop, deliveries = self._buffered.popitem()
            # A closed loop has no request that waits for an event.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_deliver, deliveries)


def _deliver(deliveries: list[_Delivery]) -> None:
    for deliver, event in deliveries:
        deliver(event)


class Waited(NamedTuple):
    """Seconds that a thread has run, and waited for a processor."""

    ran: float
    waited: float


def read_waits() -> dict[str, Waited]:
    """Return the seconds that each thread ran and waited; empty where there is no account."""
    found: dict[str, Waited] = {}
    for account in _TASKS.glob("*/schedstat"):
        # A thread may have ended, or the system keeps no such account.
        with suppress(OSError, ValueError):
            ran, waited, _ = account.read_text().split()
            found[account.parent.name] = Waited(int(ran) * _NANOSECONDS, int(waited) * _NANOSECONDS)
    return found


class ThreadGovernor:
    """Lowers the number of threads of a step while other processes use the same processors.

    The threads of a step meet many times in it. As long as each has a processor of its own that costs
    nothing; where one of them has to wait for its turn, all others wait with it, at every meeting, and a step
    takes a hundred times as long. Fewer threads lose less. Linux counts how long a thread waited for a
    processor (Documentation/scheduler/sched-stats.rst, /proc/<pid>/schedstat).
    """

    def __init__(
        self,
        num_threads: int,
        read: Callable[[], Mapping[str, Waited]] = read_waits,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most, self.num_threads = num_threads, num_threads
        self._read, self._now = read, now
        self._busy_seconds = 0.0
        self._before = read() if num_threads > 1 else {}
        self._stay = _SHORTEST_STAY
        self._changed_at = -_LONGEST_STAY

    def note(self, seconds: float) -> None:
        """Take account of a step; `num_threads` is for the next one."""
        if self._most == 1:
            return
        self._busy_seconds += seconds
        if self._busy_seconds < _WINDOW_SECONDS:
            return
        after = self._read()
        share = _waiting_share(self._before, after, self._busy_seconds)
        self._before, self._busy_seconds = after, 0.0
        now = self._now()
        since = now - self._changed_at
        if share > _CROWDED and self.num_threads > 1:
            # More threads that failed at once are tried again later.
            self._stay = min(2 * self._stay, _LONGEST_STAY) if since < self._stay else _SHORTEST_STAY
            self.num_threads, self._changed_at = self.num_threads // 2, now
        elif share < _ROOMY and self.num_threads < self._most and since >= self._stay:
            self.num_threads, self._changed_at = min(2 * self.num_threads, self._most), now


def _waiting_share(before: Mapping[str, Waited], after: Mapping[str, Waited], busy_seconds: float) -> float:
    """Return the largest share that a thread waited of those that were at work for most of the time."""
    share = 0.0
    for name, now in after.items():
        then = before.get(name, now)
        ran, waited = now.ran - then.ran, now.waited - then.waited
        if ran + waited > busy_seconds / 2:
            share = max(share, waited / (ran + waited))
    return share
