"""How fast a training file is taken in, and with how much memory: `python -m benchmarks.upload_speed`.

The same generated JSONL goes to an API process of ours, which parses, checks, hashes and stores it while it
streams, and in the same run to the peer (peers/upload_form.py), which uvicorn runs as it runs ours. Pairs
alternate in order. The bars: 0.9 times the peer's speed, and 64 MiB of memory above the idle process, with
what it starts for the upload.
"""

import argparse
import http.client
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.results_file import ROOT
from benchmarks.throw_away import throw_away_postgres
from db.session import Database
from luthier.core.ids import new_api_key
from luthier.core.settings import MIB, Settings
from services.bootstrap import ensure_first_rows

BAR_SPEED, BAR_MEMORY_BYTES = 0.9, 64 * MIB
SEED = 7
_START_SECONDS = 60.0
_HEAD = (
    b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="rows.jsonl"\r\n\r\n'
)
_TAIL = b"\r\n--x--\r\n"


@dataclass(frozen=True)
class Side:
    """One of the two services: where it answers, which process it is."""

    name: str
    port: int
    pid: int
    key: str

    def ask(self, method: str, path: str, body: Iterator[bytes] | None = None, size: int = 0) -> bytes:
        """Send a request and return the answer's body; anything but 200 ends the benchmark."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=3600)
        headers = {"Authorization": f"Bearer {self.key}"}
        if body is not None:
            headers |= {"Content-Type": "multipart/form-data; boundary=x", "Content-Length": str(size)}
        connection.request(method, path, body=body, headers=headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if answer.status != 200:
            raise SystemExit(f"{self.name} answered {answer.status}: {content[:300]!r}")
        return content

    def status_bytes(self, field: str) -> int:
        """Return a line of the process's /proc/PID/status in bytes."""
        text = Path(f"/proc/{self.pid}/status").read_text()
        return int(text.split(f"{field}:")[1].split()[0]) * 1024

    def forget_peak(self) -> None:
        """Let the peak memory begin anew (proc(5), clear_refs)."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    @contextmanager
    def watch_children(self) -> Iterator[list[int]]:
        """Yield what comes to hold the peak bytes of each process that this one starts meanwhile."""
        peaks: dict[int, int] = {}
        found: list[int] = []
        is_over = threading.Event()

        def watch() -> None:
            while not is_over.wait(0.05):
                # Threads and processes come and go between two looks.
                with suppress(OSError, IndexError):
                    for task in Path(f"/proc/{self.pid}/task").iterdir():
                        for pid in map(int, (task / "children").read_text().split()):
                            peaks[pid] = Side(self.name, self.port, pid, "").status_bytes("VmHWM")

        watching = threading.Thread(target=watch)
        watching.start()
        try:
            yield found
        finally:
            is_over.set()
            watching.join()
            found += peaks.values()


def make_block() -> bytes:
    """Return about 1 MiB of chat rows of a few hundred bytes to a few thousand, as json.dumps writes them.

    One in eight has its letters beyond ASCII as they are, the others have them escaped.
    """
    draw = random.Random(SEED)
    words = ["the", "bow", "of", "an", "old", "viola", "sounds", "warm", "naïve", "木", "once", "more"]
    lines, num_bytes = [], 0
    while num_bytes < MIB:
        turns = [
            {"role": role, "content": " ".join(draw.choices(words, k=draw.randint(10, 160)))}
            for role in ("system", *("user", "assistant") * draw.randint(1, 3))
        ]
        lines.append(json.dumps({"messages": turns}, ensure_ascii=draw.random() < 0.875).encode() + b"\n")
        num_bytes += len(lines[-1])
    return b"".join(lines)


def upload(side: Side, block: bytes, num_blocks: int) -> float:
    """Send a file of that many blocks and return the seconds until the answer; the file is deleted again."""

    def body() -> Iterator[bytes]:
        yield _HEAD
        for _ in range(num_blocks):
            yield block
        yield _TAIL

    size = len(_HEAD) + len(_TAIL) + num_blocks * len(block)
    started = time.perf_counter()
    made = json.loads(side.ask("POST", "/v1/files", body(), size))
    seconds = time.perf_counter() - started
    if made["bytes"] != num_blocks * len(block):
        raise SystemExit(f"{side.name} took {made['bytes']} bytes")
    if side.key:
        side.ask("DELETE", f"/v1/files/{made['id']}")
    return seconds


@contextmanager
def _process(
    name: str, command: list[str], folder: Path, port: int, key: str, **environment: str
) -> Iterator[Side]:
    with (folder / f"{name}.log").open("wb") as log:
        running = subprocess.Popen(
            [sys.executable, "-m", "luthier.core.runtime", str(os.getpid()), sys.executable, *command],
            cwd=ROOT,
            env={**os.environ, **environment, "TMPDIR": str(folder)},
            stdout=log,
            stderr=log,
        )
    side = Side(name, port, running.pid, key)
    try:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                side.ask("GET", "/readyz")
                break
            except OSError:
                if running.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit((folder / f"{name}.log").read_text()[-2000:]) from None
                time.sleep(0.1)
        yield side
    finally:
        running.terminate()
        running.wait(timeout=30)


@contextmanager
def ours(folder: Path, port: int) -> Iterator[Side]:
    """Run an API process over a fresh database and a local folder."""
    key = new_api_key()
    with throw_away_postgres(folder) as url:
        settings = Settings(_env_file=None, database_url=url, bootstrap_api_key=key)  # type: ignore[call-arg]
        database = Database(url, pool_size=1)
        with database.transaction() as session:
            ensure_first_rows(session, settings)
        database.close()
        command = ["-m", "api", "--port", str(port)]
        environment = {
            "LUTHIER_DATABASE_URL": url,
            "LUTHIER_REDIS_URL": "redis+socket:///nowhere",
            "LUTHIER_STORAGE_URL": f"file://{folder}/objects",
            "LUTHIER_INFERENCE_URL": f"unix://{folder}/none.sock",
            "LUTHIER_MAX_UPLOAD_BYTES": str(1 << 40),
        }
        with _process("ours", command, folder, port, key, **environment) as side:
            yield side


@contextmanager
def peer(folder: Path, port: int) -> Iterator[Side]:
    """Run the peer's app."""
    app = "benchmarks.peers.upload_form:app"
    command = ["-m", "uvicorn", app, "--port", str(port), "--no-access-log"]
    with _process("peer", command, folder, port, "") as side:
        yield side


def measure(sides: list[Side], num_blocks: int, num_pairs: int) -> tuple[list[float], int]:
    """Run the pairs and print each; return their ratios and our memory above idle, with what it starts."""
    block, ratios, most_above = make_block(), [], 0
    num_bytes = num_blocks * len(block)
    for side in sides:
        upload(side, block, 4)
    us, _ = sides
    idle_bytes = us.status_bytes("VmRSS")
    for pair in range(num_pairs):
        speeds: dict[str, float] = {}
        for side in sides if pair % 2 == 0 else sides[::-1]:
            side.forget_peak()
            with side.watch_children() as child_bytes:
                speeds[side.name] = num_bytes / upload(side, block, num_blocks) / MIB
            if side is us:
                above = us.status_bytes("VmHWM") - idle_bytes + sum(child_bytes)
                most_above = max(most_above, above)
        ratios.append(speeds["ours"] / speeds["peer"])
        print(
            f"pair {pair + 1}: ours {speeds['ours']:6.1f} MiB/s   peer {speeds['peer']:6.1f} MiB/s   "
            f"ratio {ratios[-1]:.2f}   memory above idle {most_above / MIB:.1f} MiB",
            flush=True,
        )
    return ratios, most_above


def main() -> None:
    """Measure, print, and end with 1 when a bar is not met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.upload_speed")
    parser.add_argument("--gib", type=float, default=2.0, help="size of the file (%(default)s)")
    parser.add_argument("--pairs", type=int, default=5, help="uploads to each side (%(default)s)")
    parser.add_argument("--port", type=int, default=8620, help="ours; the peer's is the next (%(default)s)")
    options = parser.parse_args()
    num_blocks = max(1, round(options.gib * 1024))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lt-upload-", dir="/tmp")))
        # The database's user must pass through it.
        folder.chmod(0o755)
        sides = [
            stack.enter_context(ours(folder, options.port)),
            stack.enter_context(peer(folder, options.port + 1)),
        ]
        ratios, above_bytes = measure(sides, num_blocks, options.pairs)
    median = statistics.median(ratios)
    print(
        f"{options.gib:g} GiB of JSONL, {options.pairs} pairs: median ratio {median:.2f} "
        f"(bar {BAR_SPEED:g}), memory above idle {above_bytes / MIB:.1f} MiB (bar {BAR_MEMORY_BYTES // MIB})"
    )
    if median < BAR_SPEED or above_bytes > BAR_MEMORY_BYTES:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
