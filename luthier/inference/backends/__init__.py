"""Clients of inference servers, one file each; a new file here is a new backend. Never torch."""

import importlib
import pkgutil

from luthier.core.errors import LuthierError
from luthier.inference.backends.base import Backend


def list_backends() -> list[str]:
    """Return the names of the backends in this folder."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in names if name != "base" and not name.startswith("_"))


def open_backend(name: str, url: str, token: str) -> Backend:
    """Open a client of an inference server.

    Args:
        name: the backend's file name.
        url: where the server listens.
        token: the internal token, sent over TCP only.

    Returns:
        The client.

    Raises:
        LuthierError: when there is no such backend; the message lists those there are.
    """
    if name not in list_backends():
        raise LuthierError(f"There is no backend {name!r}; there are: {', '.join(list_backends())}.")
    module = importlib.import_module(f"{__name__}.{name}")
    backend: Backend = module.open_backend(url, token)
    return backend
