"""`python -m benchmarks.serve.client`: sends streaming requests and notes when each token comes.

A process of its own, so that what measures takes no turn of what is measured. One JSON line in, one out:
`{"url", "requests": [{"method", "path", "headers", "body", "at_seconds"}], "concurrency"}`. HTTP/1.1 over a
Unix socket or TCP by hand (RFC 9112), which costs a few microseconds a token. Never torch.
"""

import asyncio
import gc
import json
import sys
import time
from typing import Any
from urllib.parse import urlsplit

from luthier.core.inference import HEADER_DIGEST

_DATA = b"data: "
_MAX_LINE_BYTES = 1 << 20


async def _open(url: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return await asyncio.open_unix_connection(parts.netloc + parts.path, limit=_MAX_LINE_BYTES)
    return await asyncio.open_connection(parts.hostname, parts.port, limit=_MAX_LINE_BYTES)


async def _pieces(reader: asyncio.StreamReader, headers: dict[str, str]) -> Any:
    """Yield the body's pieces: chunks, or all of it."""
    if headers.get("transfer-encoding") != "chunked":
        length = headers.get("content-length")
        yield await (reader.read() if length is None else reader.readexactly(int(length)))
        return
    while size := int((await reader.readline()).split(b";")[0], 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    status = int((await reader.readline()).split()[1])
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.decode("latin-1").partition(":")
        headers[name.lower()] = value.strip().lower()
    return status, headers


class _Answer:
    """What one request brought, moment by moment."""

    def __init__(self) -> None:
        self.sent = time.perf_counter()
        self.moments: list[float] = []
        self.texts: list[str] = []
        self.num_tokens: int | None = None
        self.finish: str | None = None
        self.digest: str | None = None
        self.error: str | None = None

    def take(self, line: bytes) -> None:
        """Read one event of the stream."""
        now = time.perf_counter()
        if not line.startswith(_DATA) or line.startswith(b"data: [DONE]"):
            return
        event = json.loads(line[len(_DATA) :])
        if "error" in event:
            self.error = str(event["error"])[:300]
        if event.get("usage"):
            self.num_tokens = event["usage"]["completion_tokens"]
        for choice in event.get("choices") or ():
            text = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
            if text:
                self.moments.append(now)
                self.texts.append(text)
            self.finish = choice.get("finish_reason") or self.finish

    def tell(self, begin: float) -> dict[str, Any]:
        """Return it as JSON, times in seconds since the run's begin."""
        gaps = [later - earlier for earlier, later in zip(self.moments, self.moments[1:], strict=False)]
        return {
            "error": self.error,
            "sent": self.sent - begin,
            "first": self.moments[0] - begin if self.moments else None,
            "end": time.perf_counter() - begin,
            "num_tokens": self.num_tokens,
            "finish": self.finish,
            "digest": self.digest,
            "text": "".join(self.texts),
            "gaps": gaps,
        }


async def _send(url: str, request: dict[str, Any], begin: float) -> dict[str, Any]:
    body = json.dumps(request["body"]).encode()
    lines = [
        f"{request.get('method', 'POST')} {request['path']} HTTP/1.1",
        "host: bench",
        "connection: close",
    ]
    lines += ["content-type: application/json", f"content-length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in request.get("headers", {}).items()]
    answer = _Answer()
    try:
        reader, writer = await _open(url)
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        status, headers = await _read_head(reader)
        answer.digest = headers.get(HEADER_DIGEST)
        held = b""
        async for piece in _pieces(reader, headers):
            *whole, held = (held + piece).split(b"\n")
            for line in whole:
                answer.take(line)
        answer.take(held)
        if status != 200:
            answer.error = f"status {status}: {held.decode(errors='replace')[:300]}"
        writer.close()
    except (OSError, ValueError, IndexError, asyncio.IncompleteReadError) as error:
        answer.error = f"{type(error).__name__}: {error}"
    return answer.tell(begin)


async def _run(order: dict[str, Any]) -> dict[str, Any]:
    begin = time.perf_counter()
    turns = asyncio.Semaphore(order.get("concurrency") or len(order["requests"]))

    async def one(request: dict[str, Any]) -> dict[str, Any]:
        await asyncio.sleep(max(0.0, begin + request.get("at_seconds", 0.0) - time.perf_counter()))
        async with turns:
            return await _send(order["url"], request, begin)

    answers = await asyncio.gather(*map(one, order["requests"]))
    return {"answers": answers, "seconds": time.perf_counter() - begin}


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
