"""The calls of the `openai` package for our surface, each a function over a service that is ready for it."""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import openai
from openai.resources.files import Files
from openai.resources.fine_tuning.alpha.graders import Graders
from openai.resources.fine_tuning.checkpoints.permissions import Permissions
from openai.resources.fine_tuning.jobs.checkpoints import Checkpoints
from openai.resources.fine_tuning.jobs.jobs import Jobs
from openai.resources.models import Models
from openai.resources.uploads.parts import Parts
from openai.resources.uploads.uploads import Uploads
from openai.resources.webhooks.event_types import EventTypes
from openai.resources.webhooks.webhooks import Webhooks

from tests.receiver import Receiver
from tests.rows import colour_rows, jsonl

ROWS = jsonl(colour_rows())
# Where each resource hangs on the client.
RESOURCES: dict[str, type] = {
    "files": Files,
    "uploads": Uploads,
    "uploads.parts": Parts,
    "models": Models,
    "fine_tuning.jobs": Jobs,
    "fine_tuning.jobs.checkpoints": Checkpoints,
    "fine_tuning.checkpoints.permissions": Permissions,
    "fine_tuning.alpha.graders": Graders,
    "webhooks": Webhooks,
    "webhooks.event_types": EventTypes,
}


@dataclass
class World:
    """A service with one job that has succeeded, and clients of it."""

    strict: openai.OpenAI
    # For pause and for what is read meanwhile: its states are in no type of the package.
    lenient: openai.OpenAI
    receiver: Receiver
    model: str
    job_id: str
    other_project_id: str
    made: dict[str, Any] = field(default_factory=dict)

    @property
    def permissions(self) -> Permissions:
        return self.strict.fine_tuning.checkpoints.permissions

    def sent(self) -> tuple[Any, str]:
        """Let a new endpoint be sent a test; return the request and the endpoint's secret."""
        endpoint = self.endpoint()
        self.strict.webhooks.test(endpoint.id, event_type="fine_tuning.job.succeeded")
        return self.receiver.received[-1], endpoint.signing_secret

    def file(self, client: openai.OpenAI | None = None) -> str:
        """Upload training rows and return the file's id."""
        return (client or self.strict).files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id

    def job(self, client: openai.OpenAI | None = None) -> str:
        """Create a job that no worker takes, and return its id."""
        used = client or self.strict
        return used.fine_tuning.jobs.create(model="tiny-llama", training_file=self.file()).id

    def endpoint(self) -> Any:
        """Make a webhook endpoint."""
        return self.strict.webhooks.create(
            name="mine", url=self.receiver.url, event_types=["fine_tuning.job.succeeded"]
        )

    def upload(self) -> tuple[str, str]:
        """Begin an upload, send its only part, and return both ids."""
        upload = self.strict.uploads.create(
            bytes=len(ROWS), filename="rows.jsonl", mime_type="text/jsonl", purpose="fine-tune"
        )
        part = self.strict.uploads.parts.create(upload.id, data=ROWS)
        return upload.id, part.id


def _paused(world: World) -> Any:
    """Prepare a job by hand as far as `queued`, then pause it."""
    job_id = world.job()
    world.made["queue"](job_id)
    return world.lenient.fine_tuning.jobs.pause(job_id)


def _resumed(world: World) -> Any:
    paused = _paused(world)
    assert paused.status == "paused"
    return world.strict.fine_tuning.jobs.resume(paused.id)


def _completed(world: World) -> Any:
    upload_id, part_id = world.upload()
    md5 = hashlib.md5(ROWS, usedforsecurity=False).hexdigest()
    return world.strict.uploads.complete(upload_id, part_ids=[part_id], md5=md5)


def _permission(world: World) -> Any:
    granted = world.permissions.create(world.model, project_ids=[world.other_project_id])
    return next(iter(granted))


def _unwrapped(world: World) -> Any:
    sent, secret = world.sent()
    return world.strict.webhooks.unwrap(sent.body, sent.headers, secret=secret)


def _verified(world: World) -> Any:
    sent, secret = world.sent()
    world.strict.webhooks.verify_signature(sent.body, sent.headers, secret=secret)


_GRADER: Any = {"input": "i", "name": "n", "operation": "eq", "reference": "r", "type": "string_check"}
CALLS: dict[str, Callable[[World], Any]] = {
    "files.create": lambda w: w.strict.files.create(
        file=("rows.jsonl", ROWS),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    ),
    "files.retrieve": lambda w: w.strict.files.retrieve(w.file()),
    "files.list": lambda w: w.strict.files.list(limit=2, order="asc", purpose="fine-tune"),
    "files.delete": lambda w: w.strict.files.delete(w.file()),
    "files.content": lambda w: w.strict.files.content(w.file()).read() == ROWS,
    "files.retrieve_content": lambda w: w.strict.files.retrieve_content(w.file()) == ROWS.decode(),
    "files.wait_for_processing": lambda w: w.strict.files.wait_for_processing(w.file()),
    "uploads.create": lambda w: w.strict.uploads.create(
        bytes=10, filename="rows.jsonl", mime_type="text/jsonl", purpose="fine-tune"
    ),
    "uploads.cancel": lambda w: w.strict.uploads.cancel(w.upload()[0]),
    "uploads.complete": _completed,
    "uploads.upload_file_chunked": lambda w: w.strict.uploads.upload_file_chunked(
        file=ROWS,
        filename="rows.jsonl",
        bytes=len(ROWS),
        mime_type="text/jsonl",
        purpose="fine-tune",
        part_size=700,
    ),
    "uploads.parts.create": lambda w: w.strict.uploads.parts.create(w.upload()[0], data=io.BytesIO(ROWS)),
    "models.retrieve": lambda w: w.strict.models.retrieve(w.model),
    "models.list": lambda w: w.strict.models.list(),
    "models.delete": lambda w: w.strict.models.delete(w.made["checkpoint"]),
    "fine_tuning.jobs.create": lambda w: w.strict.fine_tuning.jobs.create(
        model="gpt-4o-mini-2024-07-18",
        training_file=w.file(),
        validation_file=w.file(),
        hyperparameters={"batch_size": "auto", "learning_rate_multiplier": "auto", "n_epochs": "auto"},
        metadata={"foo": "string"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": "auto"}},
            "dpo": {"hyperparameters": {"beta": "auto"}},
            "reinforcement": {"grader": _GRADER},
        },
        seed=42,
        suffix="x",
    ),
    "fine_tuning.jobs.retrieve": lambda w: w.strict.fine_tuning.jobs.retrieve(w.job_id),
    "fine_tuning.jobs.list": lambda w: w.strict.fine_tuning.jobs.list(limit=1, metadata={"team": "a"}),
    "fine_tuning.jobs.cancel": lambda w: w.strict.fine_tuning.jobs.cancel(w.job()),
    "fine_tuning.jobs.list_events": lambda w: w.strict.fine_tuning.jobs.list_events(w.job_id, limit=3),
    "fine_tuning.jobs.pause": _paused,
    "fine_tuning.jobs.resume": _resumed,
    "fine_tuning.jobs.checkpoints.list": lambda w: w.strict.fine_tuning.jobs.checkpoints.list(w.job_id),
    "fine_tuning.checkpoints.permissions.create": _permission,
    "fine_tuning.checkpoints.permissions.retrieve": lambda w: w.permissions.retrieve(w.model),
    "fine_tuning.checkpoints.permissions.list": lambda w: w.permissions.list(w.model, order="ascending"),
    "fine_tuning.checkpoints.permissions.delete": lambda w: w.permissions.delete(
        _permission(w).id, fine_tuned_model_checkpoint=w.model
    ),
    "webhooks.create": lambda w: w.endpoint(),
    "webhooks.retrieve": lambda w: w.strict.webhooks.retrieve(w.endpoint().id),
    "webhooks.update": lambda w: w.strict.webhooks.update(w.endpoint().id, name="other"),
    "webhooks.list": lambda w: w.strict.webhooks.list(limit=2),
    "webhooks.delete": lambda w: w.strict.webhooks.delete(w.endpoint().id),
    "webhooks.rotate_secret": lambda w: w.strict.webhooks.rotate_secret(
        w.endpoint().id, keep_old_secret_active_for_24_hours=True
    ),
    "webhooks.test": lambda w: w.strict.webhooks.test(
        w.endpoint().id, event_type="fine_tuning.job.succeeded"
    ),
    "webhooks.unwrap": _unwrapped,
    "webhooks.verify_signature": _verified,
    "webhooks.event_types.list": lambda w: w.strict.webhooks.event_types.list(),
}
# What the package has and this service answers 404 to.
ABSENT = {
    "fine_tuning.alpha.graders.run": lambda w: w.strict.fine_tuning.alpha.graders.run(
        grader=_GRADER, model_sample="a"
    ),
    "fine_tuning.alpha.graders.validate": lambda w: w.strict.fine_tuning.alpha.graders.validate(
        grader=_GRADER
    ),
}
NOTES = {
    "fine_tuning.jobs.pause": "by the lenient client: the package's types know no `pausing` and `paused`",
    "files.retrieve_content": "deprecated in the package",
    "fine_tuning.checkpoints.permissions.retrieve": "deprecated in the package",
    "webhooks.unwrap": "of what the service sent",
    "webhooks.verify_signature": "of what the service sent",
}
