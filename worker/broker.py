"""The Celery consumer of wake-up messages. It runs no task and trusts no header.

Others may write to the broker's queue. Any message is acknowledged and makes the worker read Postgres; remote
control is off.
"""

from collections.abc import Callable
from typing import Any

import structlog
from celery.worker import WorkController
from celery.worker.consumer import Consumer

from services.task_queue import TASK_NAME, make_celery
from worker.context import WorkerContext

_log = structlog.get_logger()


def consume_for_ever(context: WorkerContext, wake: Callable[[], None]) -> None:
    """Call `wake` for each message until the worker stops; runs in a thread.

    What ends the consumer, such as bytes in the queue that are no message, costs its connection alone.
    """

    class WakeConsumer(Consumer):
        def create_task_handler(self, *_: Any, **__: Any) -> Callable[[Any], None]:
            def take(message: Any) -> None:
                message.ack_log_error(_log, self.connection_errors)
                if isinstance(message.headers, dict) and message.headers.get("task") == TASK_NAME:
                    wake()

            return take

    app = make_celery(context.settings.redis_url.get_secret_value())
    app.conf.worker_consumer = WakeConsumer
    while not context.stopping.is_set():
        try:
            WorkController(
                app=app,
                hostname=f"luthier@{context.worker_id}",
                pool="solo",
                concurrency=1,
                use_eventloop=False,
                without_gossip=True,
                without_mingle=True,
                without_heartbeat=True,
            ).start()
        except Exception:  # noqa: BLE001
            _log.exception("messages are not read")
        # Until it is back, the worker's processes look at every sweep.
        context.stopping.wait(context.settings.sweep_seconds)
