"""How client commands find their service: by options, then the environment, then the home."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from luthier.cli.stack.home import CONNECTION_NAME, resolve_home
from luthier.core.errors import LuthierError


class ConnectionUnknownError(LuthierError):
    """No base URL or no key is known."""

    code = "connection_unknown"


@dataclass(frozen=True)
class Connection:
    """A service and a key to it."""

    base_url: str
    api_key: str = field(repr=False)


def find_connection(base_url: str | None, api_key: str | None, home: Path | None) -> Connection:
    """Return the service that options, environment and home name; each fills only what is still missing.

    Raises:
        ConnectionUnknownError: when something is still missing; says where it was looked for.
    """
    # With an explicit home the environment does not count.
    if home is None:
        base_url = base_url or os.environ.get("LUTHIER_BASE_URL")
        api_key = api_key or os.environ.get("LUTHIER_API_KEY")
    if base_url and api_key:
        return Connection(base_url, api_key)
    path = resolve_home(home) / CONNECTION_NAME
    try:
        kept = json.loads(path.read_bytes())
        return Connection(base_url or kept["base_url"], api_key or kept["api_key"])
    except (OSError, ValueError, KeyError) as error:
        raise ConnectionUnknownError(
            f"No service is known: {path} is not there or can't be read. Start one with `luthier up`, "
            "name its home by --home, or set LUTHIER_BASE_URL and LUTHIER_API_KEY."
        ) from error
