"""Options that commands share, and the decorator for commands that call the service."""

import functools
import inspect
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from luthier.client import LuthierClient

Home = Annotated[Path | None, typer.Option(help="Home of the service; else $LUTHIER_HOME, else ./.luthier.")]
BaseUrl = Annotated[
    str | None, typer.Option(help="Service to speak to; else $LUTHIER_BASE_URL, else the home's.")
]
ApiKey = Annotated[str | None, typer.Option(help="Key to use; else $LUTHIER_API_KEY, else the home's.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]

_CONNECTION = {"home": Home, "base_url": BaseUrl, "api_key": ApiKey}


def open_client(base_url: str | None, api_key: str | None, home: Path | None) -> "LuthierClient":
    from luthier.cli.connection import find_connection
    from luthier.client import LuthierClient

    connection = find_connection(base_url, api_key, home)
    return LuthierClient(connection.base_url, connection.api_key)


def client_command(
    app: typer.Typer, name: str | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add a command with --home, --base-url and --api-key to an app; it gets a client of that service first.

    A command with a parameter `home` also gets the option's value.
    """

    def add(command: Callable[..., None]) -> Callable[..., None]:
        app.command(name)(_with_client(command))
        return command

    return add


def _with_client(command: Callable[..., None]) -> Callable[..., None]:
    own = list(inspect.signature(command).parameters.values())[1:]
    takes_home = any(parameter.name == "home" for parameter in own)
    parameters = [
        *(parameter for parameter in own if parameter.name not in {"home", "as_json"}),
        *(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
            for name, annotation in _CONNECTION.items()
        ),
        *(parameter for parameter in own if parameter.name == "as_json"),
    ]

    @functools.wraps(command)
    def run(
        *, home: Path | None = None, base_url: str | None = None, api_key: str | None = None, **arguments: Any
    ) -> None:
        if takes_home:
            arguments["home"] = home
        with open_client(base_url, api_key, home) as client:
            command(client, **arguments)

    # Typer reads both.
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    cast(Any, run).__signature__ = inspect.Signature(
        [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
    )
    return run


def command_line(command: str, home: Path | None) -> str:
    """Return a command to show to the user, with --home where it was given."""
    return command if home is None else f"{command} --home {shlex.quote(str(home))}"
