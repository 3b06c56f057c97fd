"""What a hostile client takes from 16 streams: `python -m benchmarks.hostile`.

The real service (`luthier up`) runs 16 streams of one project without a break, while a client with a key of
another project, or none, attacks it in each known way in turn (attacks.py). Bars: the same processes run, no
stream is refused or breaks off, every attack is answered or refused, no stream pauses for more than 250 ms
beyond the longest pause undisturbed, and the memory of API (with the processes that it starts) and inference
server grows by at most 256 MiB. All share the machine's processors: a control sends as many bytes in harmless
requests, so that what any client takes can be distinguished from what an attack does.
"""

import argparse
import asyncio
import json
import os
import secrets
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.hostile.attacks import ATTACKS, CHAT, CLOSED, OPEN, Target
from benchmarks.serve.process import Process
from benchmarks.train.contestants import quiet_environment
from examples.local_service import free_port, make_fresh_home, running_service
from luthier.cli.stack.home import find_lock_holder
from luthier.core.settings import MIB

NUM_STREAMS = 16
BAR_PAUSE_SECONDS, BAR_MEMORY_BYTES = 0.25, 256 * MIB
_BASE = "smollm2-135m-instruct"
# Memory is level when it has grown by less so often in a row.
_MAX_WARM_SECONDS, _LEVEL_SECONDS, _LEVEL_BYTES, _NUM_LEVEL = 240.0, 5.0, 4 * MIB, 3
# What an attack leaves behind still counts as its own.
_AFTERMATH_SECONDS = 3.0
_CLEAN = {"200", "400", "401", "413", "429", "431", "503"}
# These connections send no whole request: closing them is the answer.
_UNANSWERED = {"H1", "H2"}
_PARTS = {"-m\0api\0": "api", "luthier.inference.server": "inference", "-m\0worker\0": "worker"}


class Streams:
    """Streams of one long answer after another, each on a connection of its own."""

    def __init__(self, port: int, key: str) -> None:
        self._port, self._key = port, key
        self._pauses: list[float] = [0.0]
        # When a stream that is within an answer had its last event.
        self._last: dict[int, float] = {}
        self.faults: list[str] = []
        self.num_events = 0

    async def run(self, number: int) -> None:
        """Stream until this is cancelled."""
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                try:
                    while True:
                        await self._answer(number, reader, writer)
                finally:
                    writer.transport.abort()
            except (OSError, ValueError) as error:
                self.faults.append(f"a stream: {error}"[:300])
                self._last.pop(number, None)
                await asyncio.sleep(0.5)

    async def _answer(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        text = f"Write a long story about ship {number} and the number {time.time_ns()}."
        messages = [{"role": "user", "content": text}]
        body = json.dumps({"model": _BASE, "messages": messages, "max_tokens": 500, "stream": True}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {self._key}\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        tail = piece = await reader.read(65536)
        if piece[9:12] != b"200":
            raise ValueError(f"refused: {piece[:200]!r}")
        while not tail.endswith(b"0\r\n\r\n"):
            if not piece or b'data: {"error"' in tail:
                raise ValueError(f"broke off: {tail[-200:]!r}")
            self._last[number] = time.perf_counter()
            piece = await reader.read(65536)
            self._pauses.append(time.perf_counter() - self._last[number])
            tail = (tail + piece)[-1024:]
            self.num_events += 1
        self._last.pop(number, None)

    def take_longest_pause(self) -> float:
        """Return the longest pause between two events since this was called last."""
        now = time.perf_counter()
        longest = max(self._pauses + [now - moment for moment in self._last.values()])
        self._pauses = [0.0]
        return longest


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def _bytes_of(pid: int, field: str = "VmRSS") -> int:
    """Return a line of /proc/PID/status in bytes; 0 for a process that has ended."""
    with suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/status").read_text().split(f"{field}:")[1].split()[0]) * 1024
    return 0


def _command_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def _bytes_of_children(pid: int) -> int:
    """Return the memory of the processes that one has started; a fork that has not begun shares its own."""
    own = _command_of(pid)
    return sum(_bytes_of(child) for child in _children(pid) if _command_of(child) != own)


def _service_pids(home: Path) -> dict[str, int]:
    found = {}
    for pid in _children(find_lock_holder(home) or 0):
        command = _command_of(pid)
        name = next((_PARTS[mark] for mark in _PARTS if mark in command), Path(command.split("\0")[0]).name)
        found[name.split(":")[0]] = pid
    return found


class Run:
    """One run over a service that has started; `phases` has what was seen, by attack."""

    def __init__(self, streams: Streams, client: Process, home: Path, seconds: float) -> None:
        self._streams, self._client, self._home, self._seconds = streams, client, home, seconds
        self._pids = _service_pids(home)
        self.phases: dict[str, dict[str, Any]] = {}

    def _memory(self, field: str = "VmRSS") -> dict[str, int]:
        return {name: _bytes_of(self._pids[name], field) for name in ("api", "inference")}

    async def measure(self, names: list[str]) -> None:
        """Run the streams, undisturbed, beside each attack, and undisturbed again."""
        running = [asyncio.create_task(self._streams.run(number)) for number in range(NUM_STREAMS)]
        await self._warm()
        for name in ("undisturbed", *names, "undisturbed again"):
            if name in ATTACKS:
                await asyncio.to_thread(self._client.ask, {"prepare": name})
            self.phases[name] = await self._watch(name)
            print(_row(name, self.phases[name]), flush=True)
        for task in running:
            task.cancel()

    async def _warm(self) -> None:
        """Wait until memory is level: the first request of each kind loads code, and the cache fills."""
        for name, attack in ATTACKS.items():
            if attack.control is None:
                await asyncio.to_thread(self._client.ask, {"prepare": name})
                await asyncio.to_thread(self._client.ask, {"run": name, "seconds": 2.0})
        deadline, num_level, before = time.monotonic() + _MAX_WARM_SECONDS, 0, 0
        while time.monotonic() < deadline and num_level < _NUM_LEVEL:
            await asyncio.sleep(_LEVEL_SECONDS)
            now = sum(self._memory().values())
            num_level = num_level + 1 if now - before < _LEVEL_BYTES else 0
            before = now

    async def _send(self, name: str) -> dict[str, Any]:
        if name not in ATTACKS:
            await asyncio.sleep(self._seconds)
            return {"statuses": {}, "num_bytes": 0}
        answer = await asyncio.to_thread(self._client.ask, {"run": name, "seconds": self._seconds})
        await asyncio.sleep(_AFTERMATH_SECONDS)
        return answer

    async def _watch(self, name: str) -> dict[str, Any]:
        for pid in (self._pids["api"], self._pids["inference"]):
            # The peak begins anew (proc(5)).
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        self._streams.faults.clear()
        self._streams.take_longest_pause()
        begun, num_events, children = time.perf_counter(), self._streams.num_events, 0
        before, sending = self._memory(), asyncio.create_task(self._send(name))
        while not sending.done():
            children = max(children, _bytes_of_children(self._pids["api"]))
            await asyncio.sleep(0.05)
        peak, pids = self._memory("VmHWM"), _service_pids(self._home)
        start = self.phases.get("undisturbed", {"after": before})["after"]
        return await sending | {
            "pause": self._streams.take_longest_pause(),
            "events": (self._streams.num_events - num_events) / (time.perf_counter() - begun),
            "before": before,
            "peak": peak,
            "after": self._memory(),
            "children": children,
            "growth": sum(peak.values()) + children - sum(start.values()),
            "faults": [f"{part} died" for part, pid in self._pids.items() if pids.get(part) != pid]
            + self._streams.faults[:3],
        }

    def faults(self, name: str) -> list[str]:
        """Return which bars an attack passed."""
        phase = self.phases[name]
        quiet = max(self.phases[each]["pause"] for each in ("undisturbed", "undisturbed again"))
        unclean = phase["statuses"].keys() - _CLEAN - ({CLOSED, OPEN} if name in _UNANSWERED else set())
        pause, growth = phase["pause"] - quiet, phase["growth"]
        return [
            *phase["faults"],
            *(f"answered {status}" for status in sorted(unclean)),
            *([f"a pause of {pause * 1000:.0f} ms more"] if pause > BAR_PAUSE_SECONDS else []),
            *([f"{growth // MIB} MiB more memory"] if growth > BAR_MEMORY_BYTES else []),
        ]


_COLUMNS = (
    "attack",
    "what",
    "MiB sent",
    "answers",
    "longest pause, ms",
    "events/s",
    "API, MiB",
    "inference, MiB",
    "checks, MiB",
    "growth, MiB",
)


def _row(name: str, phase: dict[str, Any]) -> str:
    attack = ATTACKS.get(name)
    answers = ", ".join(f"{count} x {status}" for status, count in sorted(phase["statuses"].items()))
    memory = [
        " / ".join(str(phase[when][part] // MIB) for when in ("before", "peak", "after"))
        for part in ("api", "inference")
    ]
    what = "" if attack is None else f"{attack.title} (control: {attack.control or 'none'})"
    cells = [name, what, phase["num_bytes"] // MIB, answers, f"{phase['pause'] * 1000:.0f}"]
    cells += [f"{phase['events']:.0f}", *memory, phase["children"] // MIB, phase["growth"] // MIB]
    return f"| {' | '.join(map(str, cells))} |"


def _key_of_another_project(base_url: str, key: str) -> str:
    body = json.dumps({"name": "hostile", "project": "hostile"}).encode()
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    with urllib.request.urlopen(
        urllib.request.Request(f"{base_url}/keys", body, headers), timeout=30
    ) as answer:
        return str(json.load(answer)["key"])


def main() -> None:
    """Measure, print, and end with 1 when a bar is not met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hostile")
    parser.add_argument("--seconds", type=float, default=15.0, help="of each attack (%(default)s)")
    parser.add_argument("--only", action="append", choices=list(ATTACKS), help="an attack; repeat it")
    options = parser.parse_args()
    names = options.only or list(ATTACKS)
    port, inference_port = free_port(), free_port()
    # On TCP, so that its own limits are attacked as well; a small cache, which is full soon.
    os.environ["LUTHIER_INFERENCE_URL"] = f"http://127.0.0.1:{inference_port}"
    os.environ["LUTHIER_INTERNAL_TOKEN"] = secrets.token_hex(16)
    os.environ["LUTHIER_MAX_CACHE_TOKENS"] = "24576"
    with tempfile.TemporaryDirectory(prefix="lt-hostile-", dir="/tmp") as folder:
        # The database's user must pass through it.
        Path(folder).chmod(0o755)
        home = Path(folder) / "home"
        make_fresh_home(home)
        try:
            with running_service(home, port) as service:
                key = _key_of_another_project(service.base_url, service.api_key)
                target = Target(port, inference_port, key, _BASE)
                command = ["nice", "-n", "19", sys.executable, "-m", "benchmarks.hostile.attacks"]
                log = Path(folder) / "client.log"
                client = Process([*command, json.dumps(asdict(target))], quiet_environment(1), log)
                try:
                    run = Run(Streams(port, service.api_key), client, home, options.seconds)
                    print(f"| {' | '.join(_COLUMNS)} |\n{'|---' * len(_COLUMNS)}|", flush=True)
                    asyncio.run(run.measure(names))
                finally:
                    client.close()
        finally:
            # Removes its database too, which as root is elsewhere.
            make_fresh_home(home)
    faults = {name: run.faults(name) for name in names if ATTACKS[name].control}
    for name, found in faults.items():
        print(f"{name}: {'; '.join(found) or 'all bars met'}")
    if any(faults.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
