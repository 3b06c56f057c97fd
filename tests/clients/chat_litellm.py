"""litellm's chats and completions as a client; prints what it saw as one JSON object."""

import json
import os

import litellm
from asked import ASKED, CALLING, Colour

TO = {"api_base": os.environ["OPENAI_BASE_URL"], "api_key": os.environ["OPENAI_API_KEY"], "num_retries": 0}
CHAT = ASKED | {"model": "openai/tiny-llama"}
CALL = CALLING | {"model": "openai/tiny-tools"}


def main() -> None:
    whole = litellm.completion(**CHAT, **TO)
    text = whole.choices[0].message.content
    chunks = list(litellm.completion(**CHAT, **TO, stream=True, stream_options={"include_usage": True}))
    rated = litellm.completion(**CHAT, **TO, logprobs=True, top_logprobs=3).choices[0].logprobs["content"]
    parsed = litellm.completion(**CHAT | {"max_tokens": 60}, **TO, response_format=Colour)
    [call] = litellm.completion(**CALL, **TO).choices[0].message.tool_calls
    built = litellm.stream_chunk_builder(list(litellm.completion(**CALL, **TO, stream=True)))
    prompts = {"model": "text-completion-openai/tiny-llama", "prompt": ["the sky", "a"], "temperature": 0}
    texts = litellm.text_completion(**prompts, max_tokens=5, logprobs=2, **TO)
    responded = litellm.responses(
        model="openai/tiny-llama", input="the sky", temperature=0, max_output_tokens=16, **TO
    )
    reported = {
        "version": "litellm",
        "whole": text,
        "reason": whole.choices[0].finish_reason,
        "usage": [whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens],
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
        "streamed_usage": chunks[-1].usage.total_tokens,
        "stopped": litellm.completion(**CHAT, **TO, stop=[text[5:8]]).choices[0].message.content,
        "bytes": [byte for item in rated for byte in item["bytes"]],
        "num_top": [len(item["top_logprobs"]) for item in rated],
        "parsed": Colour.model_validate_json(parsed.choices[0].message.content).colour,
        "called": [
            call.function.name,
            call.function.arguments,
            built.choices[0].message.tool_calls[0].function.arguments,
        ],
        "texts": [choice.text for choice in texts.choices],
        "rated": ["".join(choice.logprobs.tokens) for choice in texts.choices],
        "responded": responded.output_text,
    }
    try:
        litellm.completion(**CHAT | {"model": "openai/no-such-model"}, **TO)
    except litellm.NotFoundError as error:
        # It keeps the message of an error and drops its code.
        is_named = "`no-such-model` does not exist" in error.message
        reported["refused"] = [error.status_code, "model_not_found" if is_named else error.message, True]
    print(json.dumps(reported))


main()
