"""`luthier chat`: one message, or a conversation, answered as the tokens arrive."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.options import client_command

if TYPE_CHECKING:
    from luthier.client import LuthierClient


@client_command
def chat(
    client: "LuthierClient",
    model: Annotated[str, typer.Argument(help="A base, a tuned model, a checkpoint or an alias.")],
    message: Annotated[str | None, typer.Argument(help="One message; without it, a conversation.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.", min=1)] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 for the likeliest answer.", min=0, max=2)
    ] = None,
) -> None:
    """Talk to a model; answers are printed as they come."""
    turns = [] if system is None else [{"role": "system", "content": system}]
    given = {"max_tokens": max_tokens, "temperature": temperature}
    parameters = {name: value for name, value in given.items() if value is not None}
    if message is not None:
        _answer(client, model, [*turns, {"role": "user", "content": message}], parameters)
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
            turns.append({"role": "assistant", "content": _answer(client, model, turns, parameters)})


def _answer(
    client: "LuthierClient", model: str, turns: list[dict[str, str]], parameters: dict[str, Any]
) -> str:
    answer = ""
    for piece in client.stream_chat({"model": model, "messages": turns, **parameters}):
        print(_escape_controls(piece), end="", flush=True)
        answer += piece
    print()
    return answer


def _escape_controls(text: str) -> str:
    return "".join(
        character if character.isprintable() or character in "\n\t" else repr(character)[1:-1]
        for character in text
    )
