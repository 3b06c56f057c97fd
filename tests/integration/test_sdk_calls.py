"""Every call of the newest `openai` package for our surface, against the served API, in its strict mode.

The strict client refuses an answer that its own types do not describe. What the package has is found by
looking into it, so that a call which a newer one adds fails here until it is in the table.
docs/sdk-calls.md is that table, written by `python -m tests.integration.test_sdk_calls > docs/sdk-calls.md`.
"""

import functools
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from luthier.core.settings import Settings
from tests.conftest import Api
from tests.receiver import running_receiver
from tests.sdk_calls import ABSENT, CALLS, NOTES, RESOURCES, ROWS, World
from tests.training import make_worker
from worker.processes import work
from worker.tasks.prepare import prepare

_TABLE = Path(__file__).parents[2] / "docs" / "sdk-calls.md"
# Members that our objects have beside OpenAI's (docs/api.md), and optional ones that they leave out.
_EXTRA: dict[str, set[str]] = {
    "FineTuningJob": {"user_provided_suffix", "started_from", "tuning", "training"},
    "Model": {"base_model", "job", "digest", "pinned", "context_length"},
    # The package's pages leave out members that OpenAI's own lists have.
    "SyncPage": {"has_more"},
    "SyncCursorPage": {"object", "first_id", "last_id"},
    "SyncConversationCursorPage": {"object", "first_id"},
}
_LEFT_OUT: dict[str, set[str]] = {"Model": {"shutdown_date"}}


def _package_calls() -> set[str]:
    return {
        f"{place}.{name}"
        for place, resource in RESOURCES.items()
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
    strict, lenient = api.client(), api.client(is_strict=False)
    context = make_worker(settings, api)
    file_id = strict.files.create(file=("rows.jsonl", ROWS), purpose="fine-tune").id
    job = strict.fine_tuning.jobs.create(
        model="tiny-llama",
        training_file=file_id,
        metadata={"team": "a"},
        extra_body={
            "hyperparameters": {"n_epochs": 2, "batch_size": 8},
            "training": {"precision": "float32"},
        },
    )
    work(context)
    done = strict.fine_tuning.jobs.retrieve(job.id)
    assert done.fine_tuned_model is not None, done.error
    checkpoints = strict.fine_tuning.jobs.checkpoints.list(job.id).data

    with running_receiver() as receiver:
        yield World(
            strict,
            lenient,
            receiver,
            done.fine_tuned_model,
            job.id,
            api.make_key()["project_id"],
            {
                "checkpoint": checkpoints[-1].fine_tuned_model_checkpoint,
                "queue": functools.partial(prepare, context),
            },
        )


def test_the_table_has_every_call_of_the_package() -> None:
    assert _package_calls() == set(CALLS) | set(ABSENT)


def test_every_call_passes_the_packages_own_validation(world: World) -> None:
    faults: list[str] = []
    for name, call in CALLS.items():
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
    # No row is so short.
    short = {"training": {"max_length": 16}}
    failing = world.strict.fine_tuning.jobs.create(
        model="tiny-llama", training_file=world.file(), extra_body=short
    ).id
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


def test_absent_calls_are_reported_as_unknown_paths(world: World) -> None:
    for name, call in ABSENT.items():
        with pytest.raises(openai.NotFoundError) as refused:
            call(world)
        assert refused.value.code == "unknown_url", name


def make_table() -> str:
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
    for name in sorted(CALLS | ABSENT):
        reported = "passes" if name in CALLS else "absent: 404 `unknown_url`"
        note = f", {NOTES[name]}" if name in NOTES else ""
        lines.append(f"| `{name}` | {reported}{note} |")
    return "\n".join(lines) + "\n"


def test_the_documented_table_is_this_one() -> None:
    documented, table = _TABLE.read_text(), make_table()
    assert documented.split("has for files")[1] == table.split("has for files")[1]


if __name__ == "__main__":
    print(make_table(), end="")
