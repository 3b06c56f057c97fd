"""What the tests of webhooks share: a job to be ended, and the one delivery that its end is owed."""

import openai
from sqlalchemy import text

from db.tables import WebhookDelivery
from tests.rows import colour_rows, jsonl
from worker.context import WorkerContext


def create_job(client: openai.OpenAI) -> str:
    file = client.files.create(file=("rows.jsonl", jsonl(colour_rows(24))), purpose="fine-tune")
    return client.fine_tuning.jobs.create(model="tiny-llama", training_file=file.id, seed=1).id


def the_delivery(context: WorkerContext) -> WebhookDelivery:
    with context.database.transaction() as session:
        return session.query(WebhookDelivery).one()


def wind(context: WorkerContext, change: str) -> None:
    """Let time pass for the only delivery."""
    with context.database.engine.begin() as connection:
        connection.execute(text(f"UPDATE webhook_deliveries SET {change}"))
