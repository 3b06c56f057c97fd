"""What the tests of webhooks share: jobs that are ended, and the delivery that an end is owed."""

from typing import Any

from sqlalchemy import text

from db.tables import WebhookDelivery
from luthier.webhooks.events import EVENT_TYPES
from tests.receiver import Received, Receiver
from tests.training import Jobs
from worker.webhook_dispatcher import deliver_due


class Hooks:
    """A project with an endpoint for all events, its receiver, and a worker that delivers."""

    def __init__(self, jobs: Jobs, receiver: Receiver) -> None:
        self.jobs, self.client, self.context = jobs, jobs.client, jobs.context
        self.receiver = receiver
        self.endpoint = self.client.webhooks.create(name="mine", url=receiver.url, event_types=[*EVENT_TYPES])

    def cancel_job(self) -> str:
        """Create a job and cancel it, which is reported."""
        job_id = self.jobs.create()
        self.jobs.cancel(job_id)
        return job_id

    def create(self, name: str, event_type: str = "fine_tuning.job.cancelled") -> None:
        """Make another endpoint, below the first one's path."""
        url = f"{self.receiver.url}/{name}"
        self.client.webhooks.create(name=name, url=url, event_types=[event_type])

    def deliver(self) -> int:
        return deliver_due(self.context)

    def unwrap(self, request: Received, secret: str | None = None) -> Any:
        """Return the event of a request whose signature is right, by the endpoint's secret unless another."""
        return self.client.webhooks.unwrap(
            request.body, request.headers, secret=secret or self.endpoint.signing_secret
        )

    def delivery(self) -> WebhookDelivery:
        with self.context.database.transaction() as session:
            return session.query(WebhookDelivery).one()

    def wind(self, change: str) -> None:
        """Let time pass for the only delivery."""
        self.execute(f"UPDATE webhook_deliveries SET {change}")

    def execute(self, statement: str, **values: Any) -> None:
        with self.context.database.engine.begin() as connection:
            connection.execute(text(statement), values)
