"""Sending a piece of a response without a task that would have to be woken for it. Never torch."""

import types
from collections.abc import Awaitable, Coroutine, Generator
from typing import Any, cast

from starlette.types import Message, Send


def piece_message(piece: bytes) -> Message:
    """Return what a web server is given to send a piece of a body that goes on."""
    return {"type": "http.response.body", "body": piece, "more_body": True}


def send_now(send: Send, piece: bytes) -> Awaitable[None] | None:
    """Send a piece as a task would run it, up to where it has to wait, which it hardly ever has.

    Args:
        send: of whatever web server or framework, made by `async def`.
        piece: not empty.

    Returns:
        What is still to be awaited, None when all is sent.

    Raises:
        Exception: what it could not be sent for.
    """
    sending = cast(Coroutine[Any, None, None], send(piece_message(piece)))
    try:
        awaited = sending.send(None)
    except StopIteration:
        return None
    return _go_on(sending, awaited)


@types.coroutine
def _go_on(sending: Coroutine[Any, None, None], awaited: Any) -> Generator[Any, None, None]:
    """Go on with a coroutine that was run up to where it awaits something."""
    try:
        yield awaited
    except BaseException:
        sending.close()
        raise
    yield from sending
