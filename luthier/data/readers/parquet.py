"""Parquet, read from a whole file: its table of contents is at its end.

The library that reads it believes what a file claims of itself, and ends its process on some damage. So it
runs in a process of its own (`luthier.data.readers.parquet_process`) with limits on memory and processor
time, no settings and no secrets. The end of that process is a fault of the file.
"""

import subprocess
import sys
from collections.abc import Generator
from pathlib import Path

import msgspec

from luthier.core.runtime import bare_environment
from luthier.data.formats.base import Fault
from luthier.data.readers.base import Limits, RawRow

MAGIC = b"PAR1"
# The memory that a row group and a batch of rows may take beyond the library itself.
MAX_MEMORY_BYTES = 1024 * 1024 * 1024
MAX_PROCESSOR_SECONDS = 1800


def read_parquet(path: Path, limits: Limits) -> Generator[RawRow | Fault]:
    """Yield the rows of a Parquet file, numbered from 1; a fault where a column or a row breaks a rule.

    A table's null counts as an absent key, since its columns can't leave one out.
    """
    command = [sys.executable, "-P", "-m", "luthier.data.readers.parquet_process"]
    # One handle: the file may be deleted while it is read.
    with path.open("rb") as source:
        process = subprocess.Popen(
            [*command, msgspec.json.encode(limits).decode()],
            stdin=source,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=bare_environment() | {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1"},
        )
    assert process.stdout is not None
    number = 0
    try:
        for line in process.stdout:
            if not line.endswith(b"\n"):
                break
            number += 1
            if line.startswith(b"{"):
                yield RawRow(number, line[:-1], 0, is_numbered_by_row=True)
            else:
                yield Fault(*msgspec.json.decode(line))
        if process.wait() != 0:
            yield limits_fault(number + 1)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def limits_fault(number: int) -> Fault:
    """Return the fault of a file that used up its reader's memory or time, or crashed it."""
    advice = (
        f"The Parquet file can't be read with {MAX_MEMORY_BYTES // 2**20} MiB of memory: it is damaged, or "
        "its row groups are too large; write smaller ones, or send JSON lines."
    )
    return Fault(number, None, None, "parquet.limits", advice, number)
