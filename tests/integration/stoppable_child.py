"""A stand-in for the training process that works until it is asked to stop, and an attempt over it."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from luthier.core.events import StoppedEvent, TrainingEvent
from tests.integration.training_script import Script
from worker.context import WorkerContext
from worker.heartbeat import lease_heartbeat
from worker.tasks.train import claim, make_run
from worker.training_process.supervisor import Ending

_LOOK_SECONDS = 0.02
_WAIT_SECONDS = 30.0


class StoppableChild:
    """A process that has said its first events; it duck-types worker.training_process.child.TrainingChild.

    Args:
        first: what it says before it is asked to stop.
        last: what it says once it is asked to stop and `may_end` is set.
    """

    def __init__(self, first: Sequence[TrainingEvent], last: Sequence[TrainingEvent]) -> None:
        self._first, self._last = list(first), list(last)
        self.is_at_work = threading.Event()
        self.is_asked = threading.Event()
        self.may_end = threading.Event()
        self.may_end.set()

    def poll_events(self, timeout_seconds: float) -> list[TrainingEvent]:
        if self._first:
            return [self._first.pop(0)]
        self.is_at_work.set()
        if not (self.is_asked.wait(_LOOK_SECONDS) and self.may_end.wait(_LOOK_SECONDS)):
            return []
        return [self._last.pop(0)] if self._last else []

    def exit_code(self) -> int | None:
        has_ended = self.is_asked.is_set() and self.may_end.is_set() and not self._last
        return 0 if has_ended else None

    def ask_to_stop(self) -> None:
        self.is_asked.set()

    def kill(self) -> None:
        self._last = []


class Attempt:
    """One attempt at the oldest queued job, followed in a thread.

    Args:
        context: the worker's parts.
        folder: an empty one.
        first: writes what the process says at once.
        last: writes what it says once it is asked to stop; a save point and `stopped` when None.
        step: the step of that save point.
    """

    def __init__(
        self,
        context: WorkerContext,
        folder: Path,
        first: Callable[[Script], object],
        last: Callable[[Script], object] | None = None,
        *,
        step: int = 1,
    ) -> None:
        claimed = claim(context)
        assert claimed is not None, "no job to claim"
        self.context, self.lease = context, claimed.lease
        script = Script(claimed.lease.job_id, claimed.spec, folder, steps_an_epoch=1, num_epochs=3)
        first(script)
        said, script.events = script.events, []
        if last is None:
            script.save_point(step, "state")
            script.events.append(StoppedEvent(job_id=claimed.lease.job_id, step=step))
        else:
            last(script)
        self.child = StoppableChild(said, script.events)
        self.ending: Ending | None = None
        self.fault: Exception | None = None

        def follow() -> None:
            try:
                with lease_heartbeat(context, claimed.lease) as heartbeat:
                    heartbeat.on_pause = self.child.ask_to_stop
                    self.ending = make_run(context, claimed, folder, heartbeat).supervise(self.child)  # type: ignore[arg-type]
            except Exception as error:  # noqa: BLE001 - the test that joins looks at it
                self.fault = error

        self._thread = threading.Thread(target=follow, daemon=True)
        self._thread.start()
        assert self.child.is_at_work.wait(_WAIT_SECONDS), self.fault

    def join(self) -> Ending | None:
        """Wait for the end and return how it ended, or None when it broke off with `fault`."""
        self._thread.join(_WAIT_SECONDS)
        assert not self._thread.is_alive(), "the attempt continues"
        return self.ending
