"""What a stream ends with when its inference server broke off, in the shape of its endpoint.

`luthier/inference/response_answers.py: error_events` makes the same of a failure in the server itself, which
knows the answer; here only its bytes are known, and torch is out of reach.
"""

import json
import re
from typing import Any

from luthier.core.errors import LuthierError

_NUMBER = re.compile(rb'"sequence_number":(\d+)')
RESPONSES_PATH = "/v1/responses"


class StreamEnd:
    """Watches a stream's pieces pass, for the case that it breaks off."""

    def __init__(self, path: str) -> None:
        self._is_response = path == RESPONSES_PATH
        self._first = self._last = b""

    def pass_on(self, piece: bytes) -> None:
        """Note a piece."""
        if self._is_response:
            self._first, self._last = self._first or piece, piece

    def broken_off(self, error: LuthierError) -> bytes:
        """Return the events that say so.

        Returns:
            For responses `error` and `response.failed`, which go on from the numbers that were sent; for all
            others the one event that SDKs know a failure by.
        """
        if not self._is_response:
            return f"data: {json.dumps(error.to_body())}\n\n".encode()
        numbers = _NUMBER.findall(self._last)
        number = int(numbers[-1]) + 1 if numbers else 0
        told = {"code": error.code, "message": error.message, "param": error.param}
        events = _event("error", number, told)
        response = _response_of(self._first)
        if response is not None:
            failure = {"code": "server_error", "message": error.message}
            failed = {"response": response | {"status": "failed", "error": failure}}
            events += _event("response.failed", number + 1, failed)
        return events


def _event(kind: str, number: int, fields: dict[str, Any]) -> bytes:
    content = {"type": kind, "sequence_number": number} | fields
    return f"event: {kind}\ndata: {json.dumps(content)}\n\n".encode()


def _response_of(piece: bytes) -> dict[str, Any] | None:
    """Return the response that a stream's first event carries; None where it came in parts."""
    for line in piece.split(b"\n"):
        if line.startswith(b"data: "):
            try:
                found = json.loads(line.removeprefix(b"data: "))["response"]
            except (ValueError, KeyError, TypeError):
                return None
            return found if isinstance(found, dict) else None
    return None
