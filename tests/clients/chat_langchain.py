"""langchain-openai's chats and completions as a client; prints what it saw as one JSON object.

Environment: OPENAI_BASE_URL, OPENAI_API_KEY.
"""

import asyncio
import json
from importlib.metadata import version

import openai
from asked import Colour
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI


@tool
def go() -> str:
    """Go."""
    return "gone"


def called(chat: ChatOpenAI) -> list[str]:
    """Let the model call a tool, whole and in a stream, and take the tool's answer back."""
    bound = chat.bind_tools([go], tool_choice="required", strict=True)
    asked = [HumanMessage("the sky")]
    message = bound.invoke(asked)
    [call] = message.tool_calls
    summed = None
    for piece in bound.stream(asked):
        summed = piece if summed is None else summed + piece
    after = [*asked, message, ToolMessage(go.invoke(call["args"]), tool_call_id=call["id"])]
    assert isinstance(chat.bind_tools([go]).invoke(after).content, str)
    return [call["name"], json.dumps(call["args"]), json.dumps(summed.tool_calls[0]["args"])]


def main() -> None:
    # Before another base than OpenAI's it does not ask for the usage of streams by itself.
    chat = ChatOpenAI(model="tiny-llama", temperature=0, max_tokens=12, max_retries=0, stream_usage=True)
    whole = chat.invoke("the sky")
    summed = None
    for piece in chat.stream("the sky"):
        summed = piece if summed is None else summed + piece
    rated = (
        chat.bind(logprobs=True, top_logprobs=3).invoke("the sky").response_metadata["logprobs"]["content"]
    )
    long = ChatOpenAI(model="tiny-llama", temperature=0, max_tokens=60, max_retries=0)
    complete = OpenAI(model="tiny-llama", temperature=0, max_tokens=5, max_retries=0)
    responding = ChatOpenAI(model="tiny-llama", temperature=0, max_tokens=16, use_responses_api=True)
    usage = whole.usage_metadata
    reported = {
        "version": version("langchain-openai"),
        "whole": whole.content,
        "reason": whole.response_metadata["finish_reason"],
        "usage": [usage["input_tokens"], usage["output_tokens"], usage["total_tokens"]],
        "streamed": summed.content,
        "streamed_usage": summed.usage_metadata["total_tokens"],
        "later": asyncio.run(chat.ainvoke("the sky")).content,
        "stopped": chat.invoke("the sky", stop=[whole.content[5:8]]).content,
        "bytes": [byte for item in rated for byte in item["bytes"]],
        "num_top": [len(item["top_logprobs"]) for item in rated],
        "parsed": long.with_structured_output(Colour, method="json_schema").invoke("the sky").colour,
        "called": called(ChatOpenAI(model="tiny-tools", temperature=0, max_tokens=80, max_retries=0)),
        "texts": [one[0].text for one in complete.generate(["the sky", "a"]).generations],
        "responded": responding.invoke("the sky").text,
    }
    try:
        ChatOpenAI(model="no-such-model", max_retries=0).invoke("the sky")
    except openai.NotFoundError as error:
        reported["refused"] = [error.status_code, error.code, bool(error.request_id)]
    print(json.dumps(reported))


main()
