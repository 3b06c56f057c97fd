"""The report on a file: its time and memory as rows grow, beside `datasets` map on the same rows.

    python -m benchmarks.data_report --rows 1000000

Three sizes (a quarter, a half, all) are reported on, each in a process of its own: seconds a row must not
grow, nor the process's peak memory. Then the peer renders and tokenises the same rows by the same chat
template and tokenizer, with `datasets` map: each of its settings on a tenth of the rows, the fastest on all
of them. Ours does that, finds faults and duplicates, and masks; the peer only makes tokens.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.train.contestants import SCRIPTS, PeerFailedError, ensure_environment, quiet_environment
from luthier.bases.catalogue import base_folder
from luthier.core.settings import Settings

_SEED = 20110101
_NUM_WORDS = 5000
# One row in 100 repeats an earlier one.
_REPEATED = 100
PEER_SETTINGS: tuple[dict[str, Any], ...] = (
    {"batched": False, "num_proc": 1},
    {"batched": True, "num_proc": 1},
    {"batched": True, "num_proc": os.cpu_count() or 1},
)


def write_rows(path: Path, num_rows: int) -> None:
    """Write chat rows of 40 to 120 made-up words.

    Args:
        path: the JSONL file.
        num_rows: how many.
    """
    generator = random.Random(_SEED)
    syllables = [
        first + second for first in "bdfgklmnprstvw" for second in ("a", "e", "i", "o", "u", "ar", "en")
    ]
    words = ["".join(generator.choices(syllables, k=generator.choice((1, 2, 3)))) for _ in range(_NUM_WORDS)]
    recent: list[str] = []
    with path.open("w") as target:
        for number in range(num_rows):
            if number % _REPEATED == _REPEATED - 1:
                target.write(generator.choice(recent))
                continue
            asked, answered = (
                " ".join(generator.choices(words, k=generator.randrange(20, 60))) for _ in "qa"
            )
            messages = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
            line = json.dumps({"messages": messages}) + "\n"
            target.write(line)
            recent = [*recent[-99:], line]


def report_once(path: Path, folder: Path) -> dict[str, Any]:
    """Report on a file in this process.

    Args:
        path: the file.
        folder: the base's.

    Returns:
        Rows, tokens, seconds, seconds of all cores together, and the peak of memory above the imports in
        bytes.
    """
    from luthier.data.reports.report import report_on_file

    before = _status_bytes("VmRSS")
    begin, cpu_begin = time.perf_counter(), time.process_time()
    found = report_on_file(path, folder, context_length=8192)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    assert found.tokens is not None
    return {
        "rows": found.rows,
        "tokens": found.tokens.total,
        "repeats": found.duplicates.exact.rows,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "memory_bytes": _status_bytes("VmHWM") - before,
    }


def _status_bytes(name: str) -> int:
    """Return a number of this process's status."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{name}:")[1].split()[0]) * 1024


def _run(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise PeerFailedError(
            done.stderr.strip().splitlines()[-1][:300] if done.stderr.strip() else "silence"
        )
    reported: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return reported


def _ours(path: Path, folder: Path) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.data_report",
        "--child",
        str(path),
        "--base-folder",
        str(folder),
    ]
    return _run(command, dict(os.environ))


def _peer(path: Path, folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    python = ensure_environment("datasets")
    with tempfile.TemporaryDirectory(prefix="peer-") as cache:
        order = {"rows": str(path), "base": str(folder), "cache": cache, **settings}
        # Its tokenizer may use all cores where one process maps, as ours does.
        environment = quiet_environment(os.cpu_count() or 1) | {"HF_DATASETS_OFFLINE": "1"}
        if settings["num_proc"] == 1:
            environment["TOKENIZERS_PARALLELISM"] = "true"
        return _run([str(python), str(SCRIPTS / "datasets_map.py"), json.dumps(order)], environment)


def measure(num_rows: int, folder: Path, scratch: Path) -> None:
    """Measure three sizes of ours and the peer, and print the lines as they come.

    Args:
        num_rows: of the largest size.
        folder: the base's.
        scratch: an empty folder with room for the rows and the peer's copies of them.
    """
    found: list[dict[str, Any]] = []
    for share in (4, 2, 1):
        path = scratch / f"rows-{share}.jsonl"
        write_rows(path, num_rows // share)
        found.append(_ours(path, folder))
        one = found[-1]
        wall, cpu = (1e6 * one[name] / one["rows"] for name in ("seconds", "cpu_seconds"))
        print(
            f"ours: {one['rows']:>9,} rows, {one['tokens']:>12,} tokens, {one['seconds']:8.1f} s, "
            f"{wall:6.1f} us a row ({cpu:.1f} of CPU), {one['memory_bytes'] / 2**20:6.0f} MiB",
            flush=True,
        )
    per_row = [one["seconds"] / one["rows"] for one in found]
    growth = found[-1]["memory_bytes"] / found[0]["memory_bytes"]
    print(f"time a row, all by a quarter: {per_row[-1] / per_row[0]:.2f}; memory: {growth:.2f}", flush=True)
    try:
        tenth = scratch / "tenth.jsonl"
        num_tenth = max(_REPEATED, num_rows // 10)
        write_rows(tenth, num_tenth)
        tried = [(_peer(tenth, folder, settings)["seconds"], settings) for settings in PEER_SETTINGS]
        for seconds, settings in tried:
            ratio = seconds / (per_row[-1] * num_tenth)
            print(f"datasets map on a tenth, {settings}: {seconds:.1f} s, {ratio:.2f} times ours", flush=True)
        best = min(tried, key=lambda one: one[0])[1]
        peer = _peer(scratch / "rows-1.jsonl", folder, best)
    except PeerFailedError as error:
        print(f"datasets map: {error}")
        return
    assert peer["tokens"] == found[-1]["tokens"], "the peer made other tokens"
    ratio = peer["seconds"] / found[-1]["seconds"]
    print(f"datasets map, {best}: {peer['seconds']:.1f} s; ours is {ratio:.2f} times as fast")


def main() -> None:
    """Measure, or report on one file as a child."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the largest size")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="a fetched base's id")
    parser.add_argument("--base-folder", type=Path, help="a base's folder, in place of --base")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    folder = chosen.base_folder or base_folder(Settings().bases_dir, chosen.base)
    if chosen.child is not None:
        print(json.dumps(report_once(chosen.child, folder)))
        return
    with tempfile.TemporaryDirectory(prefix="data-report-") as scratch:
        measure(chosen.rows, folder, Path(scratch))


if __name__ == "__main__":
    main()
