"""`python -m benchmarks.hostile.attacks TARGET`: the hostile client, a process of its own.

One JSON line in, one out: `{"prepare": NAME}` builds an attack's requests and uploads what they need, then
`{"run": NAME, "seconds"}` sends them in turn at a fixed rate. Built beforehand and written by hand, they cost
the client little of the processors that it shares with the service.
"""

import asyncio
import contextlib
import gzip
import itertools
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from luthier.core.http_limits import raise_open_file_limit
from luthier.core.ids import new_api_key
from luthier.core.settings import MIB

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
JOBS, ESTIMATE = "/v1/fine_tuning/jobs", "/v1/fine_tuning/jobs/estimate"
# The largest body of a request for an answer, and the longest line of a file.
_LARGE = 8 * MIB
# Of a connection that sends no whole request.
CLOSED, OPEN = "closed", "open"
_ANSWER_SECONDS, _PIECE_BYTES = 60.0, 256 * 1024
# Replaced in small requests by the request's number: a schema is compiled once and kept.
_NONCE = "NONCE---"
_USER, _ASSISTANT = b'{"role":"user","content":"x"}', b'{"role":"assistant","content":"x"}'


@dataclass(frozen=True)
class Target:
    """What is attacked."""

    port: int
    inference_port: int
    key: str
    model: str


@dataclass(frozen=True)
class Attack:
    """A hostile client, or a harmless one that sends as much: the `control` of others, without one itself.

    At most `num_open` requests are open at a time, and one begins every `every_seconds`.
    """

    title: str
    build: Callable[[Target], list[bytes]]
    control: str | None = None
    num_open: int = 4
    every_seconds: float = 0.5


def _request(target: Target, path: str, body: bytes, kind: str = "application/json", key: str = "") -> bytes:
    head = (
        f"POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: {kind}\r\n"
        f"authorization: Bearer {key or target.key}\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def _upload(target: Target, content: bytes) -> bytes:
    part = b"--b\r\nContent-Disposition: form-data; name="
    body = part + b'"purpose"\r\n\r\nfine-tune\r\n' + part + b'"file"; filename="a"\r\n\r\n' + content
    return _request(target, "/v1/files", body + b"\r\n--b--\r\n", "multipart/form-data; boundary=b")


def _ask(target: Target, path: str, rest: bytes) -> bytes:
    """Return a request whose last fields, JSON as text, are given."""
    prompt = {CHAT: b'"messages":[%b],' % _USER, COMPLETIONS: b'"prompt":"a",', RESPONSES: b'"input":"a",'}
    fields = b'"model":"%b",' % target.model.encode()
    if not rest.startswith((b'"messages"', b'"prompt"')):
        fields += prompt[path]
    return _request(target, path, b"{" + fields + rest + b"}")


def _items(item: bytes, num_bytes: int = _LARGE - 1024) -> bytes:
    """Return `num_bytes` of a list's items; a `%d` in one becomes its number."""
    if b"%d" not in item:
        return b",".join([item] * (num_bytes // (len(item) + 1)))
    return b",".join(item % number for number in range(num_bytes // (len(item) + 6)))


def _names_and_lists(target: Target) -> list[bytes]:
    def named(num_chars: int, num_items: int) -> bytes:
        return b'{"%b":[%b]}' % (b"k" * num_chars, _items(b"0", 2 * num_items))

    deep = b'{"a":' * 900 + b"[" + _items(b"0", 130_000) + b"]" + b"}" * 900
    asked = (
        (CHAT, b'"max_tokens":1,"user":' + named(10_000, 10_000)),
        (CHAT, b'"max_tokens":1,"metadata":' + named(60_000, 60_000)),
        (CHAT, b'"tools":[' + named(60_000, 60_000) + b"]"),
        (CHAT, b'"tools":[' + named(_LARGE // 2, 200_000) + b"]"),
        (COMPLETIONS, b'"stop":' + named(125_000, 60_000)),
        (COMPLETIONS, b'"stream_options":' + deep),
        (COMPLETIONS, b'"logit_bias":{' + _items(b'"%d":0', MIB) + b"}"),
        (RESPONSES, b'"max_output_tokens":16,"metadata":' + deep),
    )
    return [_ask(target, path, rest) for path, rest in asked]


def _hostile_lines(target: Target) -> list[bytes]:
    call = b'{"id":"c%d","type":"function","function":{"name":"f","arguments":"{}"}}'
    calls = b'{"role":"assistant","tool_calls":[' + _items(call) + b"]}"
    answers = _items(b'{"role":"tool","tool_call_id":"a","content":"x"}')
    outputs = b'"preferred_output":[%b],"non_preferred_output":[%b]' % (_ASSISTANT, _ASSISTANT)
    messages = (
        _items(b"{}"),
        _items(b"{}", 3 * 120_000),
        _USER + b"," + calls,
        _USER + b',{"role":"assistant","tool_calls":[' + _items(call, 4 * MIB) + b"]}",
        b"[" * (_LARGE - 1024),
        _items(b"1" * 4000),
    )
    lines = [b'{"messages":[' + each + b"]}" for each in messages]
    lines.append(b'{"input":{"messages":[' + answers + b"]}," + outputs + b"}")
    lines.append(b"{" + _items(b'"k%d":0') + b',"z":0,"z":0}')
    return [_upload(target, line) for line in lines]


def _schemas(target: Target) -> list[bytes]:
    def multiples(*divisors: int) -> dict[str, Any]:
        return {f"p{i}": {"type": "integer", "multipleOf": each} for i, each in enumerate(divisors)}

    def branches(count: int) -> dict[str, Any]:
        objects = [[{"properties": {f"a{i}_{j}": {}}} for j in range(count)] for i in range(3)]
        return {"p": {"allOf": [{"anyOf": each} for each in objects]}}

    nested: dict[str, Any] = {"type": "string"}
    for _ in range(40):
        nested = {"type": "array", "items": nested, "minItems": 50, "maxItems": 10_000}
    found = [
        multiples(999_983),
        multiples(*range(999_943, 999_983)),
        multiples(*[9973] * 40),
        {"p": {"enum": [f"member {i}" for i in range(9_000)]}},
        {"p": {"enum": [f"member {i}" for i in range(20_000)]}},
        {f"p{i}": {"type": ["string", "null"]} for i in range(2000)},
        branches(20),
        branches(60),
        {"p": {"type": "string", "pattern": "((a|b){1,40}c?){1,500}d"}},
        {"p": {"type": "string", "pattern": "(.{0,500}a){3}.*b.{0,500}"}},
        {"p": nested},
    ]
    schemas = [{"type": "object", "properties": each | {_NONCE: {"type": "null"}}} for each in found]
    wanted = [{"type": "json_schema", "json_schema": {"name": "a", "schema": each}} for each in schemas]
    return [_ask(target, CHAT, b'"max_tokens":8,"response_format":' + json.dumps(w).encode()) for w in wanted]


def _without_key(target: Target) -> list[bytes]:
    body, keys = b"{}".ljust(_LARGE), ("x", new_api_key())
    return [_request(target, path, body, key=key) for path in (CHAT, COMPLETIONS, RESPONSES) for key in keys]


def _large_bodies(target: Target) -> list[bytes]:
    call = b'{"id":"c%d","type":"function","function":{"name":"f","arguments":"{}"}}'
    chats = (
        b'"metadata":[' + _items(b"0"),
        b'"messages":[' + _items(b"{}"),
        b'"messages":[' + _items(_USER, 2 * MIB),
        b'"messages":[{"role":"assistant","tool_calls":[' + _items(call, 2 * MIB) + b"]}",
        b'"messages":[{"role":"user","content":"' + b"ab " * (_LARGE // 3 - 1024) + b'"}',
        b'"messages":[{"role":"user","content":"' + b"\\u0021" * (_LARGE // 6 - 1024) + b'"}',
    )
    prompts = _items(b"1000"), _items(b"1000", 5 * 249_000), _items(b'"' + b"a b " * 15_000 + b'"')
    return [_ask(target, CHAT, each + b"]") for each in chats] + [
        _ask(target, COMPLETIONS, b'"prompt":[' + each + b"]") for each in prompts
    ]


def _checks(target: Target) -> list[bytes]:
    small, row = b'{"text":"a"}\n' * 19_000, b'{"text":"a"}\n'
    varied = b"".join(b'{"text":"%x"}\n' % (number * 2654435761 % 2**32) for number in range(2_000_000))
    packed = gzip.compress(row * 5_000_000, 1), gzip.compress(varied, 1)
    return [_upload(target, each) for each in (small, row * 2_000_000, small, packed[0], small, packed[1])]


def _with_file(path: str, num_rows: int, words: str) -> Callable[[Target], list[bytes]]:
    def build(target: Target) -> list[bytes]:
        client = _Client(target, [])
        asyncio.run(client.send(target.port, _upload(target, _rows(num_rows, words))))
        body = {"model": target.model, "training_file": client.ids["file"].pop()}
        return [_request(target, path, json.dumps(body).encode())]

    return build


def _rows(num_rows: int, words: str) -> bytes:
    messages = [{"role": "user", "content": words}, {"role": "assistant", "content": words}]
    return (json.dumps({"messages": messages}).encode() + b"\n") * num_rows


def _connections(target: Target) -> list[bytes]:
    """Return what connections begin with: endless headers, silence, headers that come byte by byte."""
    start = b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-long: "
    return [start + target.key.encode() * (MIB // 16), b"", start]


def _chats(num_bytes: int) -> Callable[[Target], list[bytes]]:
    rest = b'"max_tokens":1,"response_format":{"type":"json_object"}'
    return lambda target: [_ask(target, CHAT, rest.ljust(num_bytes))]


_WORDS = "The bow of an old viola sounds warm once more. " * 10
ATTACKS = {
    "chats": Attack("ordinary chats", _chats(0)),
    "large chats": Attack("ordinary chats, padded to 8 MiB", _chats(_LARGE - 1024)),
    "uploads": Attack("uploads of 8 MiB of ordinary rows", lambda t: [_upload(t, _rows(8000, _WORDS))]),
    "estimates": Attack("estimates of 8 MiB of ordinary rows", _with_file(ESTIMATE, 8000, _WORDS)),
    "C1": Attack("long names, long lists, depth", _names_and_lists, "large chats"),
    "C2": Attack("lines of up to 8 MiB of eight shapes", _hostile_lines, "uploads"),
    "C3": Attack("schemas that are dear to compile", _schemas, "chats", num_open=6),
    "H1": Attack("headers, silence, 1,400 connections", _connections, "chats", num_open=1400),
    "H2": Attack("bodies of 8 MiB without a key", _without_key, "large chats", 100, 0.05),
    "H3": Attack("bodies of 8 MiB that are dear to parse", _large_bodies, "large chats"),
    "H4": Attack("estimates of 1,000,000 small rows", _with_file(ESTIMATE, 1_000_000, "a"), "estimates"),
    "H5": Attack("jobs of 1,000,000 small rows", _with_file(JOBS, 1_000_000, "a"), "uploads"),
    "H6": Attack("uploads of small rows, packed too", _checks, "uploads"),
}


class _Client:
    """Runs one attack."""

    def __init__(self, target: Target, requests: list[bytes]) -> None:
        self._target, self._requests = target, requests
        self._statuses: Counter[str] = Counter()
        self._num_bytes = 0
        self.ids: dict[str, set[str]] = {"file": set(), "ftjob": set()}

    async def run(self, attack: Attack, seconds: float) -> dict[str, Any]:
        """Send until the time is over; what is open then is awaited. Returns how often each status came."""
        deadline, numbers = time.monotonic() + seconds, itertools.count()
        if attack.build is _connections:
            work = [self._hold_connections(number, deadline) for number in range(attack.num_open)]
        else:
            work = [self._send_in_turn(attack, numbers, i, deadline) for i in range(attack.num_open)]
        await asyncio.gather(*work)
        answer = {"statuses": dict(self._statuses), "num_bytes": self._num_bytes}
        for job_id in self.ids["ftjob"]:
            await self.send(self._target.port, _request(self._target, f"{JOBS}/{job_id}/cancel", b""))
        return answer

    async def _send_in_turn(self, attack: Attack, numbers: Iterator[int], i: int, deadline: float) -> None:
        await asyncio.sleep(i * attack.every_seconds)
        while (begun := time.monotonic()) < deadline:
            number = next(numbers)
            request = self._requests[number % len(self._requests)]
            if len(request) < MIB:
                request = request.replace(_NONCE.encode(), b"%08d" % number)
            await self.send(self._target.port, request)
            await asyncio.sleep(max(0.0, begun + attack.num_open * attack.every_seconds - time.monotonic()))

    async def send(
        self, port: int, request: bytes, seconds: float = _ANSWER_SECONDS, drip: bytes = b""
    ) -> None:
        """Send a request, then `drip` again and again, and note how it was answered."""
        answer, outcome = b"", CLOSED
        # What came before a reset is still an answer.
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            sending = asyncio.create_task(_write(writer, request, drip))
            try:
                async with asyncio.timeout(seconds):
                    while piece := await reader.read(65536):
                        answer = (answer + piece)[:4096]
            except TimeoutError:
                outcome = OPEN if seconds < _ANSWER_SECONDS else "no answer"
            finally:
                sending.cancel()
                writer.transport.abort()
        self._num_bytes += len(request)
        self._statuses[answer[9:12].decode() or outcome] += 1
        if found := re.search(rb'"id":"((file|ftjob)-[^"]+)"', answer):
            self.ids[found[2].decode()].add(found[1].decode())

    async def _hold_connections(self, number: int, deadline: float) -> None:
        """Keep a connection open as long as the server lets it be, and then open the next."""
        port = self._target.port if number % 4 else self._target.inference_port
        kind = 0 if number < 2 else 1 + number % 2
        while (left := deadline - time.monotonic()) > 0:
            await self.send(port, self._requests[kind], left, b"a" if kind == 2 else b"")
            await asyncio.sleep(0.0 if kind else 1.0)


async def _write(writer: asyncio.StreamWriter, request: bytes, drip: bytes) -> None:
    """Write piece by piece; the server may answer and close before all is sent."""
    with contextlib.suppress(OSError):
        for start in range(0, len(request), _PIECE_BYTES):
            writer.write(memoryview(request)[start : start + _PIECE_BYTES])
            await writer.drain()
        while drip:
            await asyncio.sleep(2.0)
            writer.write(drip)


def main() -> None:
    """Answer orders until the input ends."""
    raise_open_file_limit()
    target = Target(**json.loads(sys.argv[1]))
    requests: list[bytes] = []
    for line in sys.stdin:
        order, answer = json.loads(line), {}
        if "prepare" in order:
            requests = ATTACKS[order["prepare"]].build(target)
        else:
            answer = asyncio.run(_Client(target, requests).run(ATTACKS[order["run"]], order["seconds"]))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
