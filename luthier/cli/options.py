"""Options that many commands share: which service to speak to, and how to print."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from luthier.client import LuthierClient

Home = Annotated[Path | None, typer.Option(help="Home of the service; else $LUTHIER_HOME, else ./.luthier.")]
BaseUrl = Annotated[
    str | None, typer.Option(help="Service to speak to; else $LUTHIER_BASE_URL, else the home's.")
]
ApiKey = Annotated[str | None, typer.Option(help="Key to use; else $LUTHIER_API_KEY, else the home's.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def open_client(base_url: str | None, api_key: str | None, home: Path | None) -> "LuthierClient":
    """Return a client of the service that the options name."""
    from luthier.cli.connection import find_connection
    from luthier.client import LuthierClient

    connection = find_connection(base_url, api_key, home)
    return LuthierClient(connection.base_url, connection.api_key)
