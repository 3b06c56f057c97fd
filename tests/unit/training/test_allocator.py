"""Freed memory is kept where the C library can be told so."""

import platform
import subprocess
import sys

import pytest

_TAKE_AND_FREE = """
import resource, sys
from luthier.training.allocator import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3): bytearray(24 * 1024**2)
before = faults()
for _ in range(20): bytearray(24 * 1024**2)
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_the_same_block_taken_again_brings_no_page_faults() -> None:
    def count(mode: str) -> int:
        command = [sys.executable, "-c", _TAKE_AND_FREE, mode]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    pages = 24 * 1024**2 // 4096
    assert count("keep") < pages
