"""Ids in paths: each is one segment, whatever characters it holds.

A path is decoded before it is routed, so that the `%2F` in an id would look like the end of a segment. Here
it travels as one private character, from before the routing until the handler gets its parameters.
"""

import re
from typing import cast
from urllib.parse import quote, unquote

from starlette.convertors import PathConvertor, StringConvertor, register_url_convertor
from starlette.types import ASGIApp, Receive, Scope, Send

_SLASH = "\ue02f"
_ENCODED_SLASH = re.compile("%2f", re.IGNORECASE)


class _Segment(StringConvertor):
    def convert(self, value: str) -> str:
        return value.replace(_SLASH, "/")


class _Path(PathConvertor):
    def convert(self, value: str) -> str:
        return value.replace(_SLASH, "/")


def let_ids_hold_slashes() -> None:
    """Have every route's parameters get their slashes back; called before the first route is made."""
    register_url_convertor("str", _Segment())
    register_url_convertor("path", _Path())


def shown_path(scope: Scope) -> str:
    """Return a request's path as it came, for a message."""
    return cast(bytes, scope.get("raw_path") or quote(scope["path"]).encode()).decode("latin-1")


class EncodedSlashMiddleware:
    """Keeps `%2F` from splitting a segment of the path."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] == "http":
            path, num_found = _ENCODED_SLASH.subn(quote(_SLASH), shown_path(scope))
            if num_found:
                # In place: what is outside of the routes finds there which one was taken.
                scope["path"] = unquote(path)
        await self._app(scope, receive, send)
