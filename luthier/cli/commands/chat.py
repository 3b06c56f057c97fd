"""`luthier chat`: one message, or a conversation, answered as the tokens come."""

import sys
from typing import Any

from luthier.client import LuthierClient


def chat_with(
    client: LuthierClient,
    model: str,
    message: str | None,
    *,
    system: str | None,
    parameters: dict[str, Any],
) -> None:
    """Print a model's answers.

    Args:
        message: what is asked once; when None, lines of standard input, each with the turns before it.
        parameters: of the request; those that are None are left out.
    """
    turns = [] if system is None else [{"role": "system", "content": system}]
    sent = {name: value for name, value in parameters.items() if value is not None}
    if message is not None:
        _answer(client, model, [*turns, {"role": "user", "content": message}], sent)
        return
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print("A line is a message; Ctrl-D ends.")
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            return
        if line:
            turns.append({"role": "user", "content": line})
            turns.append({"role": "assistant", "content": _answer(client, model, turns, sent)})


def _answer(client: LuthierClient, model: str, turns: list[dict[str, str]], sent: dict[str, Any]) -> str:
    answer = ""
    for piece in client.stream_chat({"model": model, "messages": turns, **sent}):
        # A model may write anything: a terminal sees its control characters escaped.
        print(_visible(piece), end="", flush=True)
        answer += piece
    print()
    return answer


def _visible(text: str) -> str:
    return "".join(
        character if character.isprintable() or character in "\n\t" else repr(character)[1:-1]
        for character in text
    )
