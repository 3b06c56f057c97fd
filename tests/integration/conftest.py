"""What most tests of the served API need: the SDK as it comes strictest, and a worker in this process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from luthier.core.settings import Settings
from luthier.webhooks.events import EVENT_TYPES
from tests.aliases import Aliases, make_ours
from tests.conftest import Api
from tests.integration.hooks import Hooks
from tests.receiver import Receiver, running_receiver
from tests.rows import colour_rows, jsonl
from tests.tiny import build_tiny_run
from tests.training import Jobs, make_worker
from tests.training_runs import Build
from worker.context import WorkerContext


@pytest.fixture
def client(api: Api) -> openai.OpenAI:
    return api.client()


@pytest.fixture
def file_id(api: Api) -> str:
    return api.upload_file(jsonl(colour_rows()))


@pytest.fixture
def context(settings: Settings, api: Api) -> WorkerContext:
    return make_worker(settings, api)


@pytest.fixture
def ours(api: Api) -> Aliases:
    return make_ours(api)


@pytest.fixture
def theirs(api: Api) -> Aliases:
    return Aliases(api.http, api.other_project().key)


@pytest.fixture
def jobs(client: openai.OpenAI, context: WorkerContext) -> Jobs:
    return Jobs(client, context)


@pytest.fixture
def build(base: Path, tmp_path: Path) -> Build:
    return lambda name, **options: build_tiny_run(tmp_path / name, base, **options)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with running_receiver() as made:
        yield made


@pytest.fixture
def endpoint(client: openai.OpenAI, receiver: Receiver) -> Any:
    return client.webhooks.create(name="mine", url=receiver.url, event_types=[*EVENT_TYPES])  # type: ignore[list-item]


@pytest.fixture
def hooks(jobs: Jobs, receiver: Receiver) -> Hooks:
    return Hooks(jobs, receiver)
