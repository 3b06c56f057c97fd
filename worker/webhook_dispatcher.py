"""Webhook dispatcher: sends due deliveries from its own thread of the worker's main process."""

import asyncio
import random
from collections.abc import Sequence

import structlog

from luthier.core.errors import LuthierError
from luthier.core.logs import origin
from luthier.webhooks.events import Outcome
from luthier.webhooks.sending import send
from luthier.webhooks.targets import TargetRules
from services.webhooks import deliveries
from services.webhooks.deliveries import ClaimedDelivery
from worker.context import WorkerContext

_log = structlog.get_logger()

_AT_ONCE = 20


def deliver_for_ever(context: WorkerContext) -> None:
    """Send what is due at every sweep; runs in a thread."""
    while not context.stopping.wait(context.settings.sweep_seconds):
        try:
            while deliver_due(context) and not context.stopping.is_set():
                pass
        except LuthierError as error:
            _log.warning("webhooks put off", reason=error.message)
        except Exception:  # noqa: BLE001
            # What was claimed is due again when its lease is over; the jobs of this worker are not touched.
            _log.exception("webhooks put off")


def deliver_due(context: WorkerContext) -> int:
    """Send what is due, once each."""
    timeout_seconds = context.settings.webhook_timeout_seconds
    with context.database.transaction() as session:
        claimed = deliveries.claim_due(
            session, context.sealer, limit=_AT_ONCE, timeout_seconds=timeout_seconds
        )
    if not claimed:
        return 0
    asyncio.run(_send_all(context, claimed))
    return len(claimed)


async def _send_all(context: WorkerContext, claimed: Sequence[ClaimedDelivery]) -> None:
    """Send them side by side, and write down what came of each as soon as it is known."""
    settings = context.settings
    rules = TargetRules.parse(
        allow_http=settings.webhook_allow_http, allowed_targets=settings.webhook_allowed_targets
    )
    unwritten: Exception | None = None
    tries = [_try(delivery, rules, settings.webhook_timeout_seconds) for delivery in claimed]
    for ended in asyncio.as_completed(tries):
        delivery, outcome = await ended
        try:
            # In a thread, or a slow database would use up the time of those still on the wire.
            await asyncio.to_thread(_record, context, delivery, outcome)
        except Exception as error:  # noqa: BLE001
            # The others' are written all the same.
            unwritten = error
    if unwritten is not None:
        raise unwritten


async def _try(
    delivery: ClaimedDelivery, rules: TargetRules, timeout_seconds: float
) -> tuple[ClaimedDelivery, Outcome]:
    if delivery.error is not None:
        _log.warning("webhook not signed", delivery_id=delivery.delivery_id, reason=delivery.error)
        return delivery, Outcome(error=delivery.error)
    try:
        return delivery, await send(delivery.message, rules, timeout_seconds=timeout_seconds)
    except Exception as error:  # noqa: BLE001
        # An unexpected error in one delivery must not stop the others, try after try.
        _log.error("webhook broke", delivery_id=delivery.delivery_id, **origin(error))
        return delivery, Outcome(error=f"it could not be sent ({type(error).__name__})")


def _record(context: WorkerContext, delivery: ClaimedDelivery, outcome: Outcome) -> None:
    with context.database.transaction() as session:
        deliveries.record(session, delivery, outcome, chance=random.random())
    if not outcome.is_success:
        _log.info(
            "webhook not delivered",
            delivery_id=delivery.delivery_id,
            num_tries=delivery.num_tries,
            status_code=outcome.status_code,
            error=outcome.error,
        )
