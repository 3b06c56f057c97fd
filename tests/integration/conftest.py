"""What most tests of the served API need: the SDK as it comes strictest, and a worker in this process."""

import openai
import pytest

from luthier.core.settings import Settings
from tests.conftest import Api
from worker.app import sweep
from worker.context import WorkerContext, make_context


@pytest.fixture
def client(api: Api) -> openai.OpenAI:
    """The SDK, which refuses an answer that its own types do not describe, and repeats nothing."""
    return openai.OpenAI(
        base_url=f"{api.base_url}/v1", api_key=api.key, max_retries=0, _strict_response_validation=True
    )


@pytest.fixture
def context(settings: Settings, api: Api) -> WorkerContext:
    """A worker that is known to be alive; its bells are noted beside the API's."""
    made = make_context(settings)
    made.ring = api.bells.append
    sweep(made)
    return made
