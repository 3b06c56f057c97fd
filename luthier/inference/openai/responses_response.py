"""The shape of a response, whole and as the named events of a stream, in OpenAI's order.

Shapes: OpenAI's API reference, "Responses" and "Streaming events". One object is one response.
"""

import time
from collections.abc import Sequence
from typing import Any

from luthier.core.errors import LuthierError
from luthier.core.ids import new_id
from luthier.core.inference import TokenUsage
from luthier.inference.engine.sequence import ChoiceAt
from luthier.inference.models.base_models import ReadyModel
from luthier.inference.openai.chat_response import ResponseFormatter, encode_json, token_logprobs
from luthier.inference.openai.generation import Ended, EndReason, Part, WholeAnswer
from luthier.inference.openai.responses_request import ResponseRequest
from luthier.inference.openai.tool_calls import CallArguments, CallBegun


class _Item:
    """A message or a call in the output, as far as it came."""

    def __init__(self, content: dict[str, Any], index: int) -> None:
        self.content = content
        self.index = index
        self.text = ""
        self.logprobs: list[dict[str, Any]] = []

    @property
    def is_message(self) -> bool:
        """Whether it is a message, else a call."""
        return bool(self.content["type"] == "message")

    @property
    def part(self) -> dict[str, Any]:
        """A message's only content part."""
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}

    def to_object(self, status: str) -> dict[str, Any]:
        """Return the item in a status; one that has just begun is empty."""
        own: dict[str, Any] = {"arguments": self.text}
        if self.is_message:
            own = {"content": [] if status == "in_progress" else [self.part]}
        return self.content | own | {"status": status}


class ResponsesFormatter(ResponseFormatter):
    """One response of /v1/responses."""

    def __init__(self, asked: ResponseRequest, model: str, ready: ReadyModel) -> None:
        self._frame: dict[str, Any] = {
            "id": new_id("response"),
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "background": False,
            "previous_response_id": None,
            "service_tier": "default",
            # Nothing is kept, whatever the request said.
            "store": False,
            "truncation": "disabled",
        } | asked.echo
        self._tokenizer = ready.base.tokenizer
        self._with_logprobs = asked.logprobs
        self._items: list[_Item] = []
        self._open: _Item | None = None
        self._reason: EndReason = "stop"
        self._num_events = 0

    def whole(self, answers: Sequence[WholeAnswer], counted: TokenUsage) -> dict[str, Any]:
        """Return the whole response: its message, where it has one, then its calls."""
        [answer] = answers
        self._reason = answer.reason
        if answer.text or not answer.calls:
            message = self._add_message()
            message.text, message.logprobs = answer.text, self._logprobs(answer.choices)
        for call in answer.calls:
            self._add_call(call.id, call.name).text = call.arguments
        return self._ended(counted)

    def first_events(self, num_choices: int) -> list[bytes]:  # noqa: ARG002
        """Return the events that say that the response is under way."""
        response = self._object("in_progress", [])
        return [self._event(f"response.{what}", response=response) for what in ("created", "in_progress")]

    def part_events(self, part: Part) -> list[bytes]:
        """Return a part's events; what it belongs to is opened before its first and closed after its last."""
        content = part.content
        if isinstance(content, CallBegun):
            return [*self._close(), *self._opened(self._add_call(content.id, content.name))]
        if isinstance(content, CallArguments):
            assert self._open is not None
            self._open.text += content.text
            return [self._item_event("response.function_call_arguments.delta", delta=content.text)]
        if isinstance(content, Ended):
            self._reason = content.reason
            events = [] if self._items else self._opened(self._add_message())
            return events + self._close()
        return self._text_events(content, part.choices)

    def _text_events(self, text: str, choices: Sequence[ChoiceAt]) -> list[bytes]:
        events: list[bytes] = []
        if self._open is None or not self._open.is_message:
            if not text:
                return events
            events = [*self._close(), *self._opened(self._add_message())]
        assert self._open is not None
        logprobs = self._logprobs(choices)
        self._open.text += text
        self._open.logprobs += logprobs
        delta = self._part_event("response.output_text.delta", delta=text, logprobs=logprobs)
        return [*events, delta]

    def last_events(self, counted: TokenUsage) -> list[bytes]:
        """Return the event that carries the whole response."""
        response = self._ended(counted)
        return [self._event(f"response.{response['status']}", response=response)]

    def error_events(self, error: LuthierError) -> list[bytes]:
        """Return the failure by itself and in the response that it ends."""
        failed = self._event("error", code=error.code, message=error.message, param=error.param)
        items = [item.to_object("incomplete") for item in self._items]
        response = self._object("failed", items)
        response["error"] = {"code": "server_error", "message": error.message}
        return [failed, self._event("response.failed", response=response)]

    def _add_message(self) -> _Item:
        content = {"id": new_id("response_message"), "type": "message", "role": "assistant"}
        return self._add(content)

    def _add_call(self, call_id: str, name: str) -> _Item:
        content = {"id": new_id("response_call"), "type": "function_call", "call_id": call_id, "name": name}
        return self._add(content)

    def _add(self, content: dict[str, Any]) -> _Item:
        item = _Item(content, len(self._items))
        self._items.append(item)
        return item

    def _opened(self, item: _Item) -> list[bytes]:
        self._open = item
        begun = item.to_object("in_progress")
        events = [self._event("response.output_item.added", output_index=item.index, item=begun)]
        if item.is_message:
            events.append(self._part_event("response.content_part.added", part=item.part))
        return events

    def _close(self) -> list[bytes]:
        item = self._open
        if item is None:
            return []
        if item.is_message:
            events = [
                self._part_event("response.output_text.done", text=item.text, logprobs=item.logprobs),
                self._part_event("response.content_part.done", part=item.part),
            ]
        else:
            name = item.content["name"]
            events = [
                self._item_event("response.function_call_arguments.done", name=name, arguments=item.text)
            ]
        self._open = None
        done = item.to_object(self._status_of(item))
        return [*events, self._event("response.output_item.done", output_index=item.index, item=done)]

    def _status_of(self, item: _Item) -> str:
        is_cut = self._reason == "length" and item is self._items[-1]
        return "incomplete" if is_cut else "completed"

    def _ended(self, counted: TokenUsage) -> dict[str, Any]:
        is_cut = self._reason == "length"
        items = [item.to_object(self._status_of(item)) for item in self._items]
        response = self._object("incomplete" if is_cut else "completed", items)
        if is_cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        response["usage"] = {
            "input_tokens": counted.input_tokens,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": counted.output_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counted.input_tokens + counted.output_tokens,
        }
        return response

    def _object(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        return self._frame | {
            "status": status,
            "error": None,
            "incomplete_details": None,
            "output": output,
            "usage": None,
        }

    def _logprobs(self, choices: Sequence[ChoiceAt]) -> list[dict[str, Any]]:
        return token_logprobs(self._tokenizer, choices) if self._with_logprobs else []

    def _part_event(self, kind: str, **fields: Any) -> bytes:
        return self._item_event(kind, content_index=0, **fields)

    def _item_event(self, kind: str, **fields: Any) -> bytes:
        assert self._open is not None
        item = self._open
        return self._event(kind, item_id=item.content["id"], output_index=item.index, **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        content = {"type": kind, "sequence_number": self._num_events} | fields
        self._num_events += 1
        return b"event: " + kind.encode() + b"\ndata: " + encode_json(content) + b"\n\n"
