"""One thread owns the weights and makes the answers; the rest of the process talks to it by a queue.

Sequences of models with a runner behind the seam run in batches of their executor (step.py); those of other
models in groups of one model each. `EngineCore` is the loop body, callable without a thread; `Engine` runs it
and blocks when idle.
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
from typing import Any, Generic, Protocol, TypeVar

import torch

from luthier.core.errors import LuthierError, UnavailableError
from luthier.inference import sampler
from luthier.inference.crowding import Crowding
from luthier.inference.engine.fair_queue import WaitingShares
from luthier.inference.engine.sequence import Sequence
from luthier.inference.engine.step import BatchExecutor
from luthier.inference.event_bridge import EventBridge
from luthier.inference.faults import log_fault, to_told
from luthier.inference.measures import StepMeasures
from luthier.inference.scheduler import Group, Prefill, Scheduler
from luthier.modeling.kernels._threads import use_threads
from luthier.modeling.logits import Logits

_LOG = logging.getLogger(__name__)

# Prompts of one prefill together: about what a small model on two cores does in a second or two.
MAX_PREFILL_TOKENS = 8192
# How long an idle engine waits for requests that came with the first one and are about to be submitted: a
# step of that one alone would take longer than its share of a step of them all.
_GATHER_SECONDS, _QUIET_SECONDS, _POLL_SECONDS = 0.006, 0.0005, 0.0001
# Full batches that may be live at once.
MAX_LIVE_BATCHES = 8

ResultT = TypeVar("ResultT")


class RunnerLike(Protocol):
    """What the engine asks of luthier.inference.runner.Runner."""

    def prefill(self, sequences: list[Sequence]) -> tuple[Any, torch.Tensor]:
        """Run prompts; return the rows' state and logits_BV."""

    def step(self, batch: Any, token_ids: list[int]) -> torch.Tensor:
        """Run a token a row; return logits_BV."""

    def keep(self, batch: Any, rows: list[int]) -> None:
        """Drop the other rows."""

    def merge(self, batch: Any, other: Any) -> None:
        """Append another batch's rows."""


class EngineCore:
    """Scheduler, runner and sampler put together, one piece of work at a time.

    Args:
        max_cache_tokens: tokens that the caches of all groups together may come to hold.
    """

    def __init__(self, runner: RunnerLike, *, max_batch_rows: int, max_cache_tokens: int) -> None:
        self._runner = runner
        self.measures = StepMeasures()
        self.events = EventBridge()
        # Those that have work; others are forgotten, so that a model that leaves frees its memory.
        self._executors: list[BatchExecutor] = []
        self.scheduler = Scheduler(
            max_batch_rows=max_batch_rows,
            max_live_rows=MAX_LIVE_BATCHES * max_batch_rows,
            max_cache_tokens=max_cache_tokens,
            max_prefill_tokens=MAX_PREFILL_TOKENS,
        )

    @property
    def has_work(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self._executors) or self.scheduler.has_work

    @property
    def num_waiting(self) -> int:
        """Sequences that do not run yet."""
        # A copy: another thread may ask.
        return self.scheduler.num_waiting + sum(one.scheduler.num_waiting for one in list(self._executors))

    @property
    def num_rows(self) -> int:
        """Sequences that run."""
        return self.scheduler.num_live_rows + sum(len(one.scheduler.running) for one in list(self._executors))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence."""
        executor: BatchExecutor | None = getattr(sequence.served, "executor", None)
        if executor is None:
            self.scheduler.add(sequence)
            return
        executor.scheduler.add(sequence)
        if executor not in self._executors:
            executor.measures, executor.on_launch = self.measures, self.events.flush
            self._executors.append(executor)

    def drain(self) -> list[Sequence]:
        """Remove all sequences and return them."""
        sequences = self.scheduler.drain()
        for executor in self._executors:
            sequences += executor.scheduler.drain()
        self._executors.clear()
        return sequences

    def step(self) -> bool:
        """Do the next piece of work: a step of every runner, and one of a group.

        A fault of one group ends the answers of that group alone.

        Returns:
            Whether there was any.
        """
        was_busy = False
        for executor in self._executors:
            was_busy |= self._step(executor)
        self._executors = [one for one in self._executors if one.scheduler.has_work]
        work = self.scheduler.next_work()
        if work is None:
            return was_busy
        try:
            if isinstance(work, Prefill):
                self._prefill(work.sequences)
            else:
                self._decode(work)
        except Exception as error:  # noqa: BLE001 - the thread must outlive any fault of one group
            self._fail(work, error)
        return True

    def _step(self, executor: BatchExecutor) -> bool:
        try:
            return executor.step()
        except Exception as error:  # noqa: BLE001 - the thread must outlive any fault of one runner
            _raise_sticky(error)
            told = to_told(_LOG, "A batch executor, whose answers all end with an error,", error)
            for sequence in executor.scheduler.drain():
                sequence.fail(told)
            return True

    def sweep(self) -> None:
        """Drop finished and cancelled sequences, and the references to weights that they hold."""
        for group in self.scheduler.groups:
            if all(sequence.is_done for sequence in group.sequences):
                self.scheduler.end(group)
        for executor in self._executors:
            executor.scheduler.sweep()

    def _prefill(self, sequences: list[Sequence]) -> None:
        self.events.flush()
        batch, logits_BV = self._runner.prefill(sequences)
        self._accept(sequences, logits_BV)
        group = Group(sequences[0].key, sequences, batch)
        if not self._drop_done(group):
            return
        host = self.scheduler.find_group(group.key, group.sequences)
        if host is None:
            self.scheduler.start(group)
            return
        self._runner.merge(host.batch, group.batch)
        host.sequences.extend(group.sequences)

    def _decode(self, group: Group) -> None:
        if not self._drop_done(group):
            self.scheduler.end(group)
            return
        self.events.flush()
        logits_BV = self._runner.step(group.batch, [sequence.last_token_id for sequence in group.sequences])
        self._accept(group.sequences, logits_BV)
        if not self._drop_done(group):
            self.scheduler.end(group)

    def _accept(self, sequences: list[Sequence], logits_BV: torch.Tensor) -> None:
        choices = sampler.choose(Logits.of(logits_BV), sequences)
        self.measures.count_step(len(sequences), sequences)
        for sequence, choice in zip(sequences, choices, strict=True):
            sequence.accept(choice)

    def _drop_done(self, group: Group) -> bool:
        rows = [row for row, sequence in enumerate(group.sequences) if not sequence.is_done]
        if rows and len(rows) < len(group.sequences):
            self._runner.keep(group.batch, rows)
        group.sequences = [group.sequences[row] for row in rows]
        return bool(rows)

    def _fail(self, work: Prefill | Group, error: Exception) -> None:
        _raise_sticky(error)
        told = to_told(_LOG, "A step, whose answers end with an error,", error)
        for sequence in work.sequences:
            sequence.fail(told)
        if isinstance(work, Group):
            self.scheduler.end(work)


def _raise_sticky(error: Exception) -> None:
    """Raise a fault of the device again: every later call of this process would fail with it."""
    if isinstance(error, torch.AcceleratorError):
        raise error


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
    """The engine's thread.

    Args:
        max_waiting: sequences that may wait; beyond them a project may have its share of as many.
        on_death: called on the engine's thread when it ends by a fault.
        stall_seconds: a step that lasts longer makes the engine not ready.
        num_threads: that torch uses on this thread; None for what it has.
    """

    def __init__(
        self,
        core: EngineCore,
        *,
        max_waiting: int,
        num_threads: int | None = None,
        on_death: Callable[[], None] | None = None,
        stall_seconds: float = math.inf,
    ) -> None:
        self._core = core
        self._on_death = on_death
        self._stall_seconds = stall_seconds
        # When the work that runs now began; None while there is none.
        self._busy_since: float | None = None
        self._waiting_shares = WaitingShares(max_waiting)
        self._num_threads = num_threads
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
    def num_waiting(self) -> int:
        """Sequences that do not run yet."""
        return self._inbox.qsize() + self._core.num_waiting

    @property
    def num_rows(self) -> int:
        """Sequences that run."""
        return self._core.num_rows

    @property
    def events(self) -> EventBridge:
        """What its sequences' events leave by."""
        return self._core.events

    @property
    def measures(self) -> StepMeasures:
        """What its steps are counted by."""
        return self._core.measures

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

        Args:
            sequences: however many, they are taken when nothing else waits.

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

        Returns:
            Its result, when it is done.

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
        return self.call(self._core.sweep)

    def close(self) -> None:
        """Take no more requests and let the thread end after its current step."""
        self._is_closed = True
        self._inbox.put(None)

    def join(self, timeout_seconds: float) -> None:
        """Wait for the thread's end."""
        self._thread.join(timeout_seconds)

    def _run(self) -> None:
        if self._num_threads is not None:
            # Each thread has a number of its own, which it copies from the last one set when it is first
            # read; so it is read before it is set.
            torch.get_num_threads()
            torch.set_num_threads(self._num_threads)
        crowding = Crowding(torch.get_num_threads())
        is_dead = True
        try:
            while not self._is_closed:
                self._take_inbox()
                started_at = self._busy_since = time.monotonic()
                if not self._core.step():
                    self.events.flush()
                num_threads = crowding.num_threads
                crowding.note(time.monotonic() - started_at)
                if crowding.num_threads != num_threads:
                    use_threads(crowding.num_threads)
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
        for sequence in self._core.drain():
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
            if not self._core.has_work:
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
                self._core.add(item)
            elif item is not None:
                self.events.flush()
                item.run()
