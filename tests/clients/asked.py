"""What the programs of this folder ask in chats; each runs in an environment of its own."""

from typing import Literal

from pydantic import BaseModel

ASKED = {
    "model": "tiny-llama",
    "messages": [{"role": "user", "content": "the sky"}],
    "temperature": 0,
    "max_tokens": 12,
}
TOOL = {
    "type": "function",
    "function": {"name": "go", "parameters": {"type": "object", "additionalProperties": False}},
}
CALLING = ASKED | {"model": "tiny-tools", "max_tokens": 80, "tools": [TOOL], "tool_choice": "required"}


class Colour(BaseModel):
    """What an answer's JSON is read as."""

    colour: Literal["red", "blue"]
