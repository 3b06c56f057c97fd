"""Serves stored bytes, all or a range of them, under a request's conditions (RFC 9110)."""

import re
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from api.errors import to_response
from api.uploads.content_disposition import content_disposition
from luthier.core.errors import PreconditionFailedError, RangeNotSatisfiableError
from luthier.storage.store import Storage

_MEDIA_TYPE = "application/octet-stream"
_RANGE_SPEC = re.compile(r"([0-9]{1,100})-([0-9]{0,100})|-([0-9]{1,100})")
_ENTITY_TAG = re.compile(r'(W/)?("[^"]*")')


def _header(request: Request, name: str) -> str | None:
    """Return a header that may have several lines, as one list."""
    lines = request.headers.getlist(name)
    return ", ".join(lines) if lines else None


def _names_tag(header: str, etag: str, *, is_weak_enough: bool) -> bool:
    """Whether a list of entity tags, or `*`, names one (RFC 9110, 8.8.3.2)."""
    if header.strip() == "*":
        return True
    return any(
        match[2] == etag and (is_weak_enough or match[1] is None) for match in _ENTITY_TAG.finditer(header)
    )


def parse_range(header: str, size_bytes: int) -> tuple[int, int] | None:
    """Parse a Range header (RFC 9110, 14.1.2 and 14.2).

    Returns:
        Start and end (exclusive) of the requested range; None to send all: for several ranges, for another
        unit than bytes, and for a malformed header.

    Raises:
        RangeNotSatisfiableError: when no byte of the object is in the range.
    """
    unit, _, ranges = header.partition("=")
    if unit.strip().lower() != "bytes":
        return None
    specs = [spec.strip() for spec in ranges.split(",") if spec.strip()]
    match = _RANGE_SPEC.fullmatch(specs[0]) if len(specs) == 1 else None
    if match is None:
        return None
    first, last, suffix = match.groups()
    if suffix is not None:
        start, end = max(0, size_bytes - int(suffix)), size_bytes
    else:
        start, end = int(first), min(size_bytes, int(last) + 1) if last else size_bytes
        if last and int(last) < start:
            return None
    if start >= end:
        raise RangeNotSatisfiableError(
            f"Range: there are {size_bytes} bytes, and none of them is in the range asked for."
        )
    return start, end


def _requested_range(request: Request, etag: str, size_bytes: int) -> tuple[int, int] | None:
    asked = request.headers.get("range")
    if asked is None or request.method != "GET":
        return None
    # A weak tag or a date does not identify the content (RFC 9110, 13.1.5).
    if request.headers.get("if-range", etag).strip() != etag:
        return None
    return parse_range(asked, size_bytes)


# The OpenAPI responses of operations that send bytes.
BYTES_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}},
    206: {"description": "The range that was asked for"},
    304: {"description": "The client has this content"},
}


async def stored_bytes(
    request: Request, storage: Storage, key: str, *, size_bytes: int, sha256: str, filename: str
) -> Response:
    """Answer a GET or HEAD with an object's bytes.

    Returns:
        200 with all bytes, 206 with a range, 304, or 416 for a range outside; to HEAD no bytes.

    Raises:
        PreconditionFailedError: when If-Match names another content.
        ArtifactCorruptError: when the object is missing.
    """
    etag = f'"{sha256}"'
    if_match, if_none_match = _header(request, "if-match"), _header(request, "if-none-match")
    if if_match is not None and not _names_tag(if_match, etag, is_weak_enough=False):
        raise PreconditionFailedError("If-Match names another content than there is; fetch it anew.")
    headers = {"ETag": etag, "Accept-Ranges": "bytes"}
    if if_none_match is not None and _names_tag(if_none_match, etag, is_weak_enough=True):
        return Response(status_code=304, headers=headers)
    try:
        asked = _requested_range(request, etag, size_bytes)
    except RangeNotSatisfiableError as error:
        refusal = to_response(error)
        refusal.headers.update(headers | {"Content-Range": f"bytes */{size_bytes}"})
        return refusal
    start, end = asked or (0, size_bytes)
    headers |= {
        "Content-Disposition": content_disposition(filename),
        "Content-Length": str(end - start),
        "X-Content-Type-Options": "nosniff",
    }
    if asked is not None:
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{size_bytes}"
    if request.method == "HEAD":
        return Response(headers=headers, media_type=_MEDIA_TYPE)
    content = await _with_first_chunk(storage.stream(key, start=start, end=end))
    return StreamingResponse(content, 200 if asked is None else 206, headers, media_type=_MEDIA_TYPE)


async def _with_first_chunk(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Return the chunks after reading the first one, so that a missing object is an error and not a 200."""
    first = await anext(chunks, b"")

    async def content() -> AsyncIterator[bytes]:
        yield first
        async for chunk in chunks:
            yield chunk

    return content()
