"""What most tests of the served API need: the SDK as it comes strictest, and a worker in this process."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from luthier.core.settings import Settings
from luthier.webhooks.events import EVENT_TYPES
from tests.conftest import Api
from tests.receiver import Receiver, running_receiver
from tests.training import make_worker
from worker.context import WorkerContext


@pytest.fixture
def client(api: Api) -> openai.OpenAI:
    """The SDK, which refuses an answer that its own types do not describe, and repeats nothing."""
    return openai.OpenAI(
        base_url=f"{api.base_url}/v1", api_key=api.key, max_retries=0, _strict_response_validation=True
    )


@pytest.fixture
def context(settings: Settings, api: Api) -> WorkerContext:
    return make_worker(settings, api)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with running_receiver() as made:
        yield made


@pytest.fixture
def endpoint(client: openai.OpenAI, receiver: Receiver) -> Any:
    return client.webhooks.create(name="mine", url=receiver.url, event_types=[*EVENT_TYPES])  # type: ignore[list-item]
