"""Freed memory is kept where the C library allows it."""

import platform
import subprocess
import sys

import pytest

_TAKE_AND_FREE = """
import resource, sys
from luthier.core.runtime import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def step(): [bytearray(b"x") * (24 * 1024**2) for _ in range(6)]
for _ in range(3): step()
before = faults()
for _ in range(10): step()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_step_that_takes_what_the_last_one_freed_brings_no_page_faults():
    def count(mode: str) -> int:
        command = [sys.executable, "-c", _TAKE_AND_FREE, mode]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    num_pages_a_step = 6 * 24 * 1024**2 // 4096
    assert count("keep") < num_pages_a_step < count("leave")
