"""Every call of the newest `openai` package for our surface, against the served API, in its strict mode.

The strict client refuses an answer that its own types do not describe. What the package has is found by
looking into it, so that a call which a newer one adds fails here until it is in the table.
docs/sdk-calls.md is that table, written by `python -m tests.integration.test_sdk_calls > docs/sdk-calls.md`.
"""

import hashlib
import inspect
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
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
from pydantic import BaseModel

from luthier.core.settings import Settings
from tests.conftest import Api
from tests.receiver import Receiver, running_receiver
from tests.rows import colour_rows, jsonl, preference_row
from worker.app import sweep, work
from worker.context import make_context

_ROWS = jsonl(colour_rows())
_TABLE = Path(__file__).parents[2] / "docs" / "sdk-calls.md"
# Where each resource hangs on the client.
_RESOURCES: dict[str, type] = {
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

    def file(self, client: openai.OpenAI | None = None) -> str:
        """Upload training rows and return the file's id."""
        return (client or self.strict).files.create(file=("rows.jsonl", _ROWS), purpose="fine-tune").id

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
            bytes=len(_ROWS), filename="rows.jsonl", mime_type="text/jsonl", purpose="fine-tune"
        )
        part = self.strict.uploads.parts.create(upload.id, data=_ROWS)
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
    md5 = hashlib.md5(_ROWS, usedforsecurity=False).hexdigest()
    return world.strict.uploads.complete(upload_id, part_ids=[part_id], md5=md5)


def _permission(world: World) -> Any:
    granted = world.strict.fine_tuning.checkpoints.permissions.create(
        world.model, project_ids=[world.other_project_id]
    )
    return next(iter(granted))


def _unwrapped(world: World) -> Any:
    endpoint = world.endpoint()
    world.strict.webhooks.test(endpoint.id, event_type="fine_tuning.job.succeeded")
    sent = world.receiver.received[-1]
    return world.strict.webhooks.unwrap(sent.body, sent.headers, secret=endpoint.signing_secret)


def _verified(world: World) -> Any:
    endpoint = world.endpoint()
    world.strict.webhooks.test(endpoint.id, event_type="fine_tuning.job.succeeded")
    sent = world.receiver.received[-1]
    world.strict.webhooks.verify_signature(sent.body, sent.headers, secret=endpoint.signing_secret)
    return None


_CALLS: dict[str, Callable[[World], Any]] = {
    "files.create": lambda w: w.strict.files.create(
        file=("rows.jsonl", _ROWS),
        purpose="fine-tune",
        expires_after={"anchor": "created_at", "seconds": 3600},
    ),
    "files.retrieve": lambda w: w.strict.files.retrieve(w.file()),
    "files.list": lambda w: w.strict.files.list(limit=2, order="asc", purpose="fine-tune"),
    "files.delete": lambda w: w.strict.files.delete(w.file()),
    "files.content": lambda w: w.strict.files.content(w.file()).read() == _ROWS,
    "files.retrieve_content": lambda w: w.strict.files.retrieve_content(w.file()) == _ROWS.decode(),
    "files.wait_for_processing": lambda w: w.strict.files.wait_for_processing(w.file()),
    "uploads.create": lambda w: w.strict.uploads.create(
        bytes=10, filename="rows.jsonl", mime_type="text/jsonl", purpose="fine-tune"
    ),
    "uploads.cancel": lambda w: w.strict.uploads.cancel(w.upload()[0]),
    "uploads.complete": _completed,
    "uploads.upload_file_chunked": lambda w: w.strict.uploads.upload_file_chunked(
        file=_ROWS,
        filename="rows.jsonl",
        bytes=len(_ROWS),
        mime_type="text/jsonl",
        purpose="fine-tune",
        part_size=700,
    ),
    "uploads.parts.create": lambda w: w.strict.uploads.parts.create(w.upload()[0], data=io.BytesIO(_ROWS)),
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
            "reinforcement": {
                "grader": {
                    "input": "input",
                    "name": "name",
                    "operation": "eq",
                    "reference": "reference",
                    "type": "string_check",
                }
            },
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
    "fine_tuning.checkpoints.permissions.retrieve": lambda w: (
        w.strict.fine_tuning.checkpoints.permissions.retrieve(w.model)
    ),
    "fine_tuning.checkpoints.permissions.list": lambda w: w.strict.fine_tuning.checkpoints.permissions.list(
        w.model, order="ascending"
    ),
    "fine_tuning.checkpoints.permissions.delete": lambda w: (
        w.strict.fine_tuning.checkpoints.permissions.delete(
            _permission(w).id, fine_tuned_model_checkpoint=w.model
        )
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
_ABSENT = {
    "fine_tuning.alpha.graders.run": lambda w: w.strict.fine_tuning.alpha.graders.run(
        grader=_GRADER, model_sample="a"
    ),
    "fine_tuning.alpha.graders.validate": lambda w: w.strict.fine_tuning.alpha.graders.validate(
        grader=_GRADER
    ),
}
_GRADER: Any = {"input": "i", "name": "n", "operation": "eq", "reference": "r", "type": "string_check"}
# Members that our objects have beside OpenAI's (docs/api.md), and optional ones that they leave out.
_EXTRA: dict[str, set[str]] = {
    "FineTuningJob": {"user_provided_suffix", "started_from", "tuning", "training"},
    "Model": {"base_model", "job", "digest", "context_length"},
    # The package's pages leave out members that OpenAI's own lists have.
    "SyncPage": {"has_more"},
    "SyncCursorPage": {"object", "first_id", "last_id"},
    "SyncConversationCursorPage": {"object", "first_id"},
}
_LEFT_OUT: dict[str, set[str]] = {"Model": {"shutdown_date"}}
_NOTES = {
    "fine_tuning.jobs.pause": "by the lenient client: the package's types know no `pausing` and `paused`",
    "files.retrieve_content": "deprecated in the package",
    "fine_tuning.checkpoints.permissions.retrieve": "deprecated in the package",
    "webhooks.unwrap": "of what the service sent",
    "webhooks.verify_signature": "of what the service sent",
}


def _package_calls() -> set[str]:
    """Return the names of all calls of the package's resources."""
    return {
        f"{place}.{name}"
        for place, resource in _RESOURCES.items()
        for name, member in inspect.getmembers(resource, inspect.isfunction)
        if not name.startswith("_")
    }


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(
        update={
            "webhook_allow_http": True,
            "webhook_allowed_targets": "127.0.0.1",
            "webhook_timeout_seconds": 5,
        }
    )


@pytest.fixture
def world(api: Api, settings: Settings) -> Iterator[World]:
    strict, lenient = (
        openai.OpenAI(
            base_url=f"{api.base_url}/v1",
            api_key=api.key,
            max_retries=0,
            _strict_response_validation=is_strict,
        )
        for is_strict in (True, False)
    )
    context = make_context(settings)
    context.ring = api.bells.append
    sweep(context)
    file_id = strict.files.create(file=("rows.jsonl", _ROWS), purpose="fine-tune").id
    job = strict.fine_tuning.jobs.create(
        model="tiny-llama",
        training_file=file_id,
        metadata={"team": "a"},
        extra_body={
            "hyperparameters": {"n_epochs": 2, "batch_size": 8},
            "training": {"precision": "float32"},
        },
    )
    work(context, job.id)
    done = strict.fine_tuning.jobs.retrieve(job.id)
    assert done.fine_tuned_model is not None, done.error
    checkpoints = strict.fine_tuning.jobs.checkpoints.list(job.id).data

    def queue(job_id: str) -> None:
        from worker.tasks.prepare import prepare

        prepare(context, job_id)

    body = {"name": "other", "project": "other"}
    other = httpx2.post(f"{api.base_url}/v1/keys", headers=api.headers, json=body).json()
    with running_receiver() as receiver:
        yield World(
            strict,
            lenient,
            receiver,
            done.fine_tuned_model,
            job.id,
            other["project_id"],
            {"checkpoint": checkpoints[-1].fine_tuned_model_checkpoint, "queue": queue},
        )


def test_the_table_has_every_call_of_the_package() -> None:
    assert _package_calls() == set(_CALLS) | set(_ABSENT)


def test_every_call_passes_the_packages_own_validation(world: World) -> None:
    faults: list[str] = []
    for name, call in _CALLS.items():
        answer = call(world)
        if name == "webhooks.verify_signature":
            # It returns nothing, and raises where the signature is wrong.
            assert answer is None
            continue
        assert answer, name
        faults += [fault for item in _objects_of(answer) for fault in _compare(name, item)]
    assert not faults, "\n".join(sorted(set(faults)))


def _objects_of(answer: Any) -> list[BaseModel]:
    """Return the objects of an answer, a list's members among them."""
    if not isinstance(answer, BaseModel):
        return []
    members = getattr(answer, "data", None)
    found = members if isinstance(members, list) else []
    return [answer, *(member for member in found if isinstance(member, BaseModel))]


def _compare(name: str, item: BaseModel) -> list[str]:
    """Hold an object's members against its type: none missing, none extra, but for the documented."""
    if name != "fine_tuning.jobs.pause":
        type(item).model_validate(item.model_dump())
    kind = type(item).__name__.partition("[")[0]
    extra = set(item.model_extra or {}) - _EXTRA.get(kind, set())
    missing = set(type(item).model_fields) - item.model_fields_set - _LEFT_OUT.get(kind, set())
    return [f"{name}: {kind} has {one}" for one in extra] + [f"{name}: {kind} lacks {one}" for one in missing]


def test_a_job_has_the_members_of_its_type_in_every_state(world: World) -> None:
    def get(job_id: str) -> Any:
        return world.strict.fine_tuning.jobs.retrieve(job_id)

    made = world.job()
    waiting = get(made)
    world.made["queue"](made)
    queued = get(made)
    world.strict.fine_tuning.jobs.cancel(made)
    preferences = jsonl([preference_row(f"number {n}", "yes", "no") for n in range(12)])
    wrong = world.strict.files.create(file=("rows.jsonl", preferences), purpose="fine-tune").id
    failing = world.strict.fine_tuning.jobs.create(model="tiny-llama", training_file=wrong).id
    world.made["queue"](failing)
    jobs = [waiting, queued, get(made), get(failing), get(world.job_id)]
    assert [job.status for job in jobs] == [
        "validating_files",
        "queued",
        "cancelled",
        "failed",
        "succeeded",
    ]
    for job in jobs:
        assert _compare(job.status, job) == []
        has_ended = job.status in ("cancelled", "failed", "succeeded")
        assert (job.finished_at is not None) == has_ended
        assert (job.fine_tuned_model is not None) == (job.status == "succeeded")
        assert (job.trained_tokens is not None) == (job.status == "succeeded")
        assert bool(job.result_files) == (job.status == "succeeded")
        assert (job.error is not None) == (job.status == "failed")


def test_absent_calls_are_told_as_unknown_paths(world: World) -> None:
    for name, call in _ABSENT.items():
        with pytest.raises(openai.NotFoundError) as refused:
            call(world)
        assert refused.value.code == "unknown_url", name


def make_table() -> str:
    """Return docs/sdk-calls.md."""
    lines = [
        "# The calls of the `openai` package",
        "",
        f"What `openai` {openai.__version__} has for files, uploads, models, fine-tuning and webhooks, each "
        "called against a served API with the package's strict response validation by "
        "`tests/integration/test_sdk_calls.py`. Chats are in [api.md](api.md).",
        "",
        "| call | |",
        "|---|---|",
    ]
    for name in sorted(_CALLS | _ABSENT):
        told = "passes" if name in _CALLS else "absent: 404 `unknown_url`"
        note = f", {_NOTES[name]}" if name in _NOTES else ""
        lines.append(f"| `{name}` | {told}{note} |")
    return "\n".join(lines) + "\n"


def test_the_documented_table_is_this_one() -> None:
    documented, table = _TABLE.read_text(), make_table()
    assert documented.split("has for files")[1] == table.split("has for files")[1]


if __name__ == "__main__":
    print(make_table(), end="")
