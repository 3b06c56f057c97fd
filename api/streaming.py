"""Bytes out of storage, whole or a range of them."""

import re
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from luthier.storage.store import Storage

_RANGE = re.compile(r"bytes=(\d{0,15})-(\d{0,15})")


def _parse_range(header: str, size_bytes: int) -> tuple[int, int] | None:
    """Return start and end (exclusive) of a single byte range (RFC 9110, 14.1.2), or None to send all."""
    match = _RANGE.fullmatch(header.strip())
    if match is None or match.groups() == ("", ""):
        return None
    first, last = match.groups()
    if first == "":
        return max(0, size_bytes - int(last)), size_bytes
    return int(first), min(size_bytes, int(last) + 1 if last else size_bytes)


def stored_bytes(
    request: Request,
    storage: Storage,
    key: str,
    *,
    size_bytes: int,
    sha256: str,
    filename: str,
) -> Response:
    """Answer with an object's bytes.

    Args:
        request: for its Range, If-Range and If-None-Match.
        storage: where the object is.
        key: the object's key.
        size_bytes: its size.
        sha256: its hash, which is the ETag.
        filename: the name for Content-Disposition.

    Returns:
        200 with all bytes, 206 with a range, 304, or 416 for a range outside.
    """
    etag = f'"{sha256}"'
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(filename, safe='')}",
        "X-Content-Type-Options": "nosniff",
    }
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    start, end, status = 0, size_bytes, 200
    asked = request.headers.get("range")
    if asked is not None and request.headers.get("if-range", etag) == etag:
        parsed = _parse_range(asked, size_bytes)
        if parsed is not None:
            start, end = parsed
            if start >= end:
                headers["Content-Range"] = f"bytes */{size_bytes}"
                return Response(status_code=416, headers=headers)
            status = 206
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{size_bytes}"
    headers["Content-Length"] = str(end - start)
    return StreamingResponse(
        storage.stream(key, start=start, end=end),
        status,
        headers,
        media_type="application/octet-stream",
    )
