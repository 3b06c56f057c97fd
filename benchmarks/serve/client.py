"""`python -m benchmarks.serve.client`: sends streaming requests and notes when each token comes.

A process of its own, so that what measures takes no turn of what is measured. One JSON line in, one out:
`{"url", "requests": [{"method", "path", "headers", "body", "at_seconds"}], "concurrency"}`. HTTP/1.1 over a
Unix socket or TCP by hand (RFC 9112); what comes is noted and read when all has come, so that the client
takes little of the processors that it shares with what it measures. Never torch.
"""

import bisect
import gc
import heapq
import itertools
import json
import select
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from luthier.core.inference import HEADER_DIGEST

_DATA = b"data: "
_BUFFER = memoryview(bytearray(1 << 16))


class _Connection:
    """One request's answer as it comes, block by block; it is read when all have come.

    Args:
        url: the server's.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self.sent = time.perf_counter()
        self.blocks: list[bytes] = []
        self.moments: list[float] = []
        self.fault: Exception | None = None
        self._socket: socket.socket | None = None

    def send(self, request: bytes) -> int | None:
        """Connect and send; return what is waited on for the answer, None where that failed."""
        parts = urlsplit(self._url)
        try:
            if parts.scheme == "unix":
                self._socket = socket.socket(socket.AF_UNIX)
                self._socket.connect(parts.netloc + parts.path)
            else:
                self._socket = socket.create_connection((parts.hostname or "", parts.port or 80))
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._socket.sendall(request)
            self._socket.setblocking(False)
        except OSError as error:
            self.fault = error
            return None
        return self._socket.fileno()

    def receive(self) -> bool:
        """Take a block; return whether the server has closed the connection, for all has come."""
        assert self._socket is not None
        try:
            count = self._socket.recv_into(_BUFFER)
        except BlockingIOError:
            return False
        except OSError as error:
            self.fault, count = error, 0
        if count:
            self.moments.append(time.perf_counter())
            self.blocks.append(bytes(_BUFFER[:count]))
            return False
        return True

    def close(self) -> None:
        """Let go of the socket."""
        if self._socket is not None:
            self._socket.close()


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


def _run(order: dict[str, Any]) -> dict[str, Any]:
    """Send requests when it is their time and their turn, and take what comes.

    Not by asyncio, whose turns take several times as long, on the processors of what is measured.
    """
    requests = order["requests"]
    most = order.get("concurrency") or len(requests)
    raws = [_to_request(request) for request in requests]
    # By their times; of equals in order.
    later = [(request.get("at_seconds", 0.0), number) for number, request in enumerate(requests)]
    heapq.heapify(later)
    waiting: deque[int] = deque()
    found: dict[int, _Connection] = {}
    is_open: dict[int, _Connection] = {}
    poll = select.epoll()
    begin = time.perf_counter()
    while True:
        now = time.perf_counter() - begin
        while later and later[0][0] <= now:
            waiting.append(heapq.heappop(later)[1])
        while waiting and len(is_open) < most:
            number = waiting.popleft()
            connection = found[number] = _Connection(order["url"])
            place = connection.send(raws[number])
            if place is None:
                connection.close()
            else:
                poll.register(place, select.EPOLLIN)
                is_open[place] = connection
        if not (later or is_open):
            break
        # Of those that wait for a turn each follows one that ends.
        wait = max(0.0, later[0][0] - (time.perf_counter() - begin)) if later else None
        for place, _ in poll.poll(wait):
            if is_open[place].receive():
                poll.unregister(place)
                is_open.pop(place).close()
    seconds = time.perf_counter() - begin
    poll.close()
    return {"answers": [_read(found[number], begin) for number in range(len(requests))], "seconds": seconds}


def main() -> None:
    """Answer orders until the input ends."""
    for line in sys.stdin:
        # A collection in the middle of a run would be reported as a gap between tokens.
        gc.collect()
        gc.disable()
        reported = _run(json.loads(line))
        gc.enable()
        print(json.dumps(reported), flush=True)


if __name__ == "__main__":
    main()
