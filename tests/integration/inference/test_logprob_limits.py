"""How many log-probabilities one request may have the server hold, whole and streamed."""

import asyncio
import json
from typing import Any

import openai
import pytest

from luthier.inference.openai import generation, generation_request
from luthier.serving import open_backend
from tests.conftest import wait_until
from tests.inference_server import BARE, CHAT, COMPLETIONS, Served

HELLO = [{"role": "user", "content": "a"}]
LIMIT = 2000


@pytest.fixture
def _limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit that the tiny base's context can reach."""
    monkeypatch.setattr(generation_request, "MAX_LOGPROBS", LIMIT)


def refusal(served: Served, path: str, **body: Any) -> dict[str, Any]:
    response = served.post(path, **body)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def test_a_chat_with_more_log_probabilities_than_the_server_holds_is_refused_unless_it_is_streamed(
    served: Served, sdk_with_tools: openai.OpenAI
) -> None:
    tools = sdk_with_tools
    asked: dict[str, Any] = {"model": "m", "messages": HELLO, "n": 128, "logprobs": True, "top_logprobs": 20}
    with pytest.raises(openai.BadRequestError) as caught:
        tools.chat.completions.create(**asked, max_tokens=800)
    assert caught.value.param == "top_logprobs"
    for part in ("2000000", str(128 * 800 * 21), "stream: true", "lower n", "max_tokens"):
        assert part in caught.value.message
    with tools.chat.completions.create(**asked, max_tokens=800, stream=True) as stream:
        assert next(iter(stream)).choices
    wait_until(lambda: not served.engine.has_work, "the stream's end")
    assert tools.chat.completions.create(**asked | {"n": 1}, max_tokens=800).choices


@pytest.mark.usefixtures("_limit")
def test_a_chat_of_unnamed_length_is_answered_up_to_the_limit(served: Served) -> None:
    end = {"logit_bias": {"40": 100}}
    answer = served.chat("a", n=4, logprobs=True, top_logprobs=4, **end)
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 4
    lengths = [len(choice["logprobs"]["content"]) for choice in answer["choices"]]
    assert lengths == [LIMIT // (4 * 5)] * 4
    # Without log-probabilities nothing is limited, nor by an answer that ends by itself.
    assert served.chat("a", n=16, **end)["usage"]["completion_tokens"] > LIMIT


@pytest.mark.usefixtures("_limit")
@pytest.mark.parametrize(
    ("body", "count"),
    [
        ({"prompt": ["a"] * 8, "max_tokens": 50, "logprobs": 4}, 2000),
        ({"prompt": ["a"] * 8, "max_tokens": 51, "logprobs": 4}, 2040),
        ({"prompt": [[7] * 100] * 4, "max_tokens": 0, "logprobs": 4, "echo": True}, 2000),
        ({"prompt": [[7] * 100] * 4, "max_tokens": 1, "logprobs": 4, "echo": True}, 2020),
        ({"prompt": [7] * 100, "n": 5, "max_tokens": 0, "logprobs": 4, "echo": True}, 2500),
    ],
)
def test_log_probabilities_of_completions_and_of_echoed_prompts_are_counted(
    served: Served, body: dict[str, Any], count: int
) -> None:
    if count > LIMIT:
        error = refusal(served, COMPLETIONS, **body)
        assert error["param"] == "logprobs" and f"could have {count}." in error["message"]
        assert served.stream(COMPLETIONS, **body)
    choices = served.post(COMPLETIONS, **(body | {"logprobs": 0})).json()["choices"]
    assert all(choice["logprobs"]["tokens"] for choice in choices)
    if count <= LIMIT:
        assert served.post(COMPLETIONS, **body).status_code == 200


def test_a_stream_without_a_reader_ends_with_an_error_before_it_fills_the_memory(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "MAX_LOGPROBS", LIMIT)
    body = {"model": "m", "prompt": ["a"] * 64, "max_tokens": 200, "logprobs": 5, "stream": True}

    async def run() -> bytes:
        backend = open_backend("engine", served.url, "")
        reply = await backend.complete(COMPLETIONS, json.dumps(body).encode(), BARE)
        await asyncio.to_thread(wait_until, lambda: not served.engine.has_work, "the answers' end")
        content = b"".join([piece async for piece in reply.events])
        await reply.aclose()
        await backend.aclose()
        return content

    content = asyncio.run(asyncio.wait_for(run(), 60))
    assert b"read too slowly" in content and b"[DONE]" not in content
    assert served.post(CHAT, messages=HELLO, max_tokens=1).status_code == 200
