"""The engine: one thread that schedules, executes, samples and delivers for every runner.

Each runner's sequences run in batches of its executor (step.py); the engine alternates between executors.
Other threads talk to it by a queue, which it sleeps in while it is idle.
"""

import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from luthier.core.errors import LuthierError, UnavailableError
from luthier.inference.engine.error_reporting import log_fault, to_client_error
from luthier.inference.engine.event_bridge import EventBridge
from luthier.inference.engine.fair_queue import WaitingShares
from luthier.inference.engine.metrics import StepMetrics
from luthier.inference.engine.sequence import Sequence
from luthier.inference.engine.step import BatchExecutor
from luthier.inference.engine.thread_governor import ThreadGovernor

_LOG = logging.getLogger(__name__)

# How long an idle engine waits for requests that came with the first one and are about to be submitted: a
# step of that one alone would take longer than its share of a step of them all.
_GATHER_SECONDS, _QUIET_SECONDS, _POLL_SECONDS = 0.006, 0.0005, 0.0001

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
        self._on_death = on_death
        self._stall_seconds = stall_seconds
        # When the work that runs now began; None while there is none.
        self._busy_since: float | None = None
        self._waiting_shares = WaitingShares(max_waiting)
        self._num_threads = num_threads
        # None until the governor changes it.
        self._num_governed_threads: int | None = None
        self._inbox: queue.SimpleQueue[Sequence | _Call[Any] | None] = queue.SimpleQueue()
        self._is_closed = False
        self._num_expected = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs and takes requests."""
        return self._thread.is_alive() and not self._is_closed

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
        """Let it be known, on the event loop's thread, that a request will be submitted within a moment.

        Yields:
            Nothing; the request is submitted inside.
        """
        self._num_expected += 1
        try:
            yield
        finally:
            self._num_expected -= 1

    def submit(self, sequences: list[Sequence]) -> None:
        """Hand over the sequences of one request, all or none.

        Raises:
            TooManyRequestsError: when too many wait already.
            UnavailableError: when the engine is closed.
        """
        if not self.is_alive:
            raise UnavailableError("The model server is shutting down; try again.")
        self._waiting_shares.take(sequences, self.num_waiting)
        for sequence in sequences:
            self._inbox.put(sequence)

    def call(self, work: Callable[[], ResultT]) -> Future[ResultT]:
        """Run work on the engine's thread between two steps, after all that was submitted before.

        Raises:
            UnavailableError: when the engine is closed.
        """
        if not self.is_alive:
            raise UnavailableError("The model server is shutting down; try again.")
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

    def drain(self) -> list[Sequence]:
        """Remove all sequences and return them."""
        sequences = [one for executor in self._executors for one in executor.scheduler.drain()]
        self._executors.clear()
        return sequences

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
        for sequence in self.drain():
            sequence.fail(error)
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
