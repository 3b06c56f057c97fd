"""`python -m benchmarks.serve.client`: sends streaming requests and notes when each token comes.

A process of its own, so that what measures takes no turn of what is measured. One JSON line in, one out:
`{"url", "requests": [{"method", "path", "headers", "body", "at_seconds"}], "concurrency"}`. HTTP/1.1 over a
Unix socket or TCP by hand (RFC 9112); what comes is noted and read when all has come, so that the client
takes little of the processors that it shares with what it measures. Never torch.
"""

import asyncio
import bisect
import gc
import itertools
import json
import sys
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from luthier.core.inference import HEADER_DIGEST

_DATA = b"data: "
_BUFFER = memoryview(bytearray(1 << 16))


class _Connection(asyncio.BufferedProtocol):
    """One request's answer as it comes, block by block; it is read when all have come.

    Blocks come by one buffer: asyncio's other protocols make and cut a quarter of a megabyte for each.

    Args:
        request: what is sent.
        sent: when, connecting included.
    """

    def __init__(self, request: bytes, sent: float) -> None:
        self._request, self.sent = request, sent
        self.blocks: list[bytes] = []
        self.moments: list[float] = []
        self.fault: Exception | None = None
        self.is_over = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the request."""
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        """Return where the next block is put."""
        return _BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        """Note when a block came."""
        self.moments.append(time.perf_counter())
        self.blocks.append(bytes(_BUFFER[:nbytes]))

    def connection_lost(self, exc: Exception | None) -> None:
        """Note that all has come: the server closes the connection."""
        self.fault = exc
        if not self.is_over.done():
            self.is_over.set_result(None)


async def _send(url: str, request: bytes) -> _Connection:
    parts, loop, sent = urlsplit(url), asyncio.get_running_loop(), time.perf_counter()

    def connect() -> _Connection:
        return _Connection(request, sent)

    if parts.scheme == "unix":
        _, connection = await loop.create_unix_connection(connect, parts.netloc + parts.path)
    else:
        _, connection = await loop.create_connection(connect, parts.hostname, parts.port)
    await connection.is_over
    return connection


def _to_request(request: dict[str, Any]) -> bytes:
    body = json.dumps(request["body"]).encode()
    lines = [
        f"{request.get('method', 'POST')} {request['path']} HTTP/1.1",
        "host: bench",
        "connection: close",
        "content-type: application/json",
        f"content-length: {len(body)}",
    ]
    lines += [f"{name}: {value}" for name, value in request.get("headers", {}).items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def _body_of(raw: bytes, start: int, headers: dict[str, str]) -> Iterator[tuple[bytes, int]]:
    """Yield the body's pieces and where each ends in the answer: chunks, or all of it."""
    if headers.get("transfer-encoding") != "chunked":
        if len(raw) - start != int(headers.get("content-length", len(raw) - start)):
            raise ValueError("the answer broke off")
        yield raw[start:], len(raw)
        return
    while True:
        end = raw.index(b"\r\n", start)
        size = int(raw[start:end].split(b";")[0], 16)
        if size == 0:
            return
        start = end + 2 + size
        if len(raw) < start:
            raise ValueError("the answer broke off")
        yield raw[end + 2 : start], start
        start += 2


def _read(connection: _Connection, begin: float) -> dict[str, Any]:
    """Return what one request brought as JSON, times in seconds since the run's begin."""
    raw = b"".join(connection.blocks)
    ends = list(itertools.accumulate(map(len, connection.blocks)))
    found: dict[str, Any] = {"error": None, "num_tokens": None, "finish": None, "digest": None}
    moments: list[float] = []
    texts: list[str] = []
    try:
        if connection.fault is not None:
            raise connection.fault
        head, _, _ = raw.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        found["digest"] = headers.get(HEADER_DIGEST)
        held = b""
        for piece, end in _body_of(raw, len(head) + 4, headers):
            moment = connection.moments[bisect.bisect_left(ends, end)]
            *whole, held = (held + piece).split(b"\n")
            for line in whole:
                _take(line, moment - begin, found, moments, texts)
        if first.split()[1] != "200":
            found["error"] = f"status {first.split()[1]}: {held.decode(errors='replace')[:300]}"
    except (OSError, ValueError, IndexError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    gaps = [later - earlier for earlier, later in itertools.pairwise(moments)]
    return found | {
        "sent": connection.sent - begin,
        "first": moments[0] if moments else None,
        "end": (connection.moments[-1] if connection.moments else time.perf_counter()) - begin,
        "text": "".join(texts),
        "gaps": gaps,
    }


def _take(line: bytes, moment: float, found: dict[str, Any], moments: list[float], texts: list[str]) -> None:
    """Read one event of a stream."""
    if not line.startswith(_DATA) or line.startswith(b"data: [DONE]"):
        return
    event = json.loads(line[len(_DATA) :])
    if "error" in event:
        found["error"] = str(event["error"])[:300]
    if event.get("usage"):
        found["num_tokens"] = event["usage"]["completion_tokens"]
    for choice in event.get("choices") or ():
        text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
        if text:
            moments.append(moment)
            texts.append(text)
        found["finish"] = choice.get("finish_reason") or found["finish"]


async def _run(order: dict[str, Any]) -> dict[str, Any]:
    turns = asyncio.Semaphore(order.get("concurrency") or len(order["requests"]))

    async def one(request: dict[str, Any], raw: bytes) -> _Connection | OSError:
        await asyncio.sleep(max(0.0, begin + request.get("at_seconds", 0.0) - time.perf_counter()))
        async with turns:
            try:
                return await _send(order["url"], raw)
            except OSError as error:
                return error

    requests = [(request, _to_request(request)) for request in order["requests"]]
    begin = time.perf_counter()
    found = await asyncio.gather(*(one(*request) for request in requests))
    seconds = time.perf_counter() - begin
    answers = [_failed(one) if isinstance(one, OSError) else _read(one, begin) for one in found]
    return {"answers": answers, "seconds": seconds}


def _failed(error: OSError) -> dict[str, Any]:
    """Return what a request brought that could not be sent."""
    nothing = dict.fromkeys(("sent", "first", "end", "num_tokens", "finish", "digest"))
    return nothing | {"error": f"{type(error).__name__}: {error}", "text": "", "gaps": []}


def main() -> None:
    """Answer orders until the input ends."""
    for line in sys.stdin:
        # A collection in the middle of a run would be told as a gap between tokens.
        gc.collect()
        gc.disable()
        told = asyncio.run(_run(json.loads(line)))
        gc.enable()
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
