"""Clients of inference servers, one file each; a new file here is a new backend. Never torch."""

import importlib
import pkgutil

from luthier.core.errors import LuthierError
from luthier.core.settings import Settings
from luthier.serving.base import Backend
from luthier.serving.router import ReplicaRouter


def list_backends() -> list[str]:
    """Return the names of the backends in this folder."""
    names = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in names if name not in {"base", "router"} and not name.startswith("_"))


def open_all(settings: Settings) -> Backend:
    """Open a client of all inference servers that the settings name.

    Raises:
        LuthierError: when there is no such backend, or no URL.
    """
    token, urls = settings.internal_token.get_secret_value(), settings.inference_urls
    opened = [open_backend(settings.inference_backend, url, token, settings) for url in urls]
    if not opened:
        raise LuthierError("LUTHIER_INFERENCE_URL is empty; it must name one inference server at least.")
    return opened[0] if len(opened) == 1 else ReplicaRouter(dict(zip(urls, opened, strict=True)))


def open_backend(name: str, url: str, token: str, settings: Settings | None = None) -> Backend:
    """Open a client of an inference server.

    Args:
        url: where the server listens.
        token: the internal token, sent over TCP only.
        settings: what the backend needs beyond that, where it does.

    Raises:
        LuthierError: when there is no such backend; the message lists those there are.
    """
    if name not in list_backends():
        raise LuthierError(f"There is no backend {name!r}; there are: {', '.join(list_backends())}.")
    module = importlib.import_module(f"{__name__}.{name}")
    backend: Backend = module.open_backend(url, token, settings)
    return backend
