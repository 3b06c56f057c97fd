"""Chats and completions of a program written for OpenAI, run by whichever `openai` its interpreter has.

Every answer is held to the package's own types (strict validation). Prints what it saw as one JSON object.
Environment: OPENAI_BASE_URL, OPENAI_API_KEY.
"""

import asyncio
import json

import openai
from asked import ASKED, CALLING, Colour


def chats(client: openai.OpenAI) -> dict[str, object]:
    whole = client.chat.completions.create(**ASKED)
    text = whole.choices[0].message.content
    chunks = list(
        client.chat.completions.create(**ASKED, stream=True, stream_options={"include_usage": True})
    )
    rated = client.chat.completions.create(**ASKED, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    chat = client.chat if hasattr(client.chat.completions, "parse") else client.beta.chat
    parsed = chat.completions.parse(**ASKED | {"max_tokens": 60}, response_format=Colour)
    [call] = client.chat.completions.create(**CALLING).choices[0].message.tool_calls
    pieces = [
        piece.function.arguments
        for chunk in client.chat.completions.create(**CALLING, stream=True)
        for piece in chunk.choices[0].delta.tool_calls or []
    ]
    return {
        "whole": text,
        "reason": whole.choices[0].finish_reason,
        "usage": [whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens],
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
        "streamed_usage": chunks[-1].usage.total_tokens,
        "stopped": client.chat.completions.create(**ASKED, stop=[text[5:8]]).choices[0].message.content,
        "bytes": [byte for item in rated for byte in item.bytes],
        "num_top": [len(item.top_logprobs) for item in rated],
        "parsed": parsed.choices[0].message.parsed.colour,
        "called": [call.function.name, call.function.arguments, "".join(pieces)],
    }


def texts(client: openai.OpenAI) -> dict[str, object]:
    """Complete texts, and score them as harnesses do."""
    asked = {"model": "tiny-llama", "prompt": ["the sky", "a"], "temperature": 0, "max_tokens": 5}
    whole = client.completions.create(**asked, logprobs=2)
    streamed = ["", ""]
    # The package's types know no null, which OpenAI's streams have for the reason of an end that is to come,
    # and the first token of a prompt for its log-probability.
    loose = openai.OpenAI()
    for chunk in loose.completions.create(**asked, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    scored = loose.completions.create(**asked | {"max_tokens": 0}, logprobs=1, echo=True)
    return {
        "texts": [choice.text for choice in whole.choices],
        "texts_streamed": streamed,
        "rated": ["".join(choice.logprobs.tokens) for choice in whole.choices],
        "scored": [choice.logprobs.token_logprobs for choice in scored.choices],
        "responded": client.responses.create(
            model="tiny-llama", input="the sky", temperature=0, max_output_tokens=16
        ).output_text,
    }


async def later() -> str:
    """Ask with the asynchronous client, in a stream."""
    async with openai.AsyncOpenAI(_strict_response_validation=True) as client:
        stream = await client.chat.completions.create(**ASKED, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])


def main() -> None:
    client = openai.OpenAI(_strict_response_validation=True)
    reported = {"version": openai.__version__, "later": asyncio.run(later())} | chats(client) | texts(client)
    try:
        client.chat.completions.create(**ASKED | {"model": "no-such-model"})
    except openai.NotFoundError as error:
        reported["refused"] = [error.status_code, error.code, bool(error.request_id)]
    print(json.dumps(reported))


main()
