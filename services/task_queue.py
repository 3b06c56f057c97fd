"""The task queue: a Celery message that holds a job id and only wakes a worker.

Lost, duplicated, late or forged messages do no harm: the worker reads from Postgres what there is to do.
"""

import os
import queue
import threading
from collections.abc import Callable
from typing import Any

import structlog
from celery import Celery
from sqlalchemy import event
from sqlalchemy.orm import Session

TASK_NAME = "luthier.wake"
QUEUE = "luthier"

Notify = Callable[[str], None]
_MAX_WAITING = 100
_log = structlog.get_logger()


def make_celery(redis_url: str) -> Celery:
    """Return the Celery application; the URL is `redis://…`, or `redis+socket:///path` for a Unix socket."""
    app = Celery("luthier", broker=redis_url)
    app.conf.update(
        task_default_queue=QUEUE,
        task_ignore_result=True,
        # The lease in Postgres gives at-least-once; an early ack keeps Redis from running a job twice.
        task_acks_late=False,
        task_reject_on_worker_lost=False,
        worker_prefetch_multiplier=1,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        broker_connection_retry_on_startup=True,
        # Workers try again for ever: jobs start at their sweeps meanwhile.
        broker_connection_max_retries=None,
        # Write access to the broker must not be enough to stop, grow or query a worker.
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        accept_content=["json"],
        task_protocol=2,
        worker_hijack_root_logger=False,
        broker_transport_options={
            "visibility_timeout": 300,
            "unacked_restore_interval": 5,
            "unacked_restore_throttle": 1,
            "health_check_interval": 5,
            "socket_timeout": 10,
            "socket_connect_timeout": 1,
            "socket_keepalive": True,
            # Sent within a request: give up fast, a worker's sweep finds the row.
            "max_retries": 0,
        },
    )
    return app


class TaskNotifier:
    """Sends messages from its own thread, so that a broker that hangs delays no request.

    A message that can't be sent is logged and dropped, and so are those that exceed the queue.
    """

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._waiting: queue.Queue[str] = queue.Queue(_MAX_WAITING)
        self._pid = 0

    def notify(self, job_id: str) -> None:
        """Queue a message for a job; never blocks."""
        if self._pid != os.getpid():
            # The first message of this process: a thread does not survive a fork.
            self._pid, self._waiting = os.getpid(), queue.Queue(_MAX_WAITING)
            threading.Thread(target=self._send_for_ever, args=(self._waiting,), daemon=True).start()
        try:
            self._waiting.put_nowait(job_id)
        except queue.Full:
            _log.warning("notification dropped, the queue is full", job_id=job_id)

    def _send_for_ever(self, waiting: "queue.Queue[str]") -> None:
        while True:
            job_id = waiting.get()
            try:
                self._app.send_task(TASK_NAME, args=[job_id], queue=QUEUE, retry=False, ignore_result=True)
            except Exception as error:  # noqa: BLE001
                # The row is committed and a worker's sweep finds it; the next message is tried too.
                _log.warning("notification not sent", job_id=job_id, error=type(error).__name__)


def notify_after_commit(session: Session, notify: Notify, job_id: str) -> None:
    """Wake a worker once the session's transaction is committed, and not at all if it never is."""

    def _notify(_session: Any) -> None:
        notify(job_id)

    event.listen(session, "after_commit", _notify, once=True)
