"""Memory that is prepared for adapters, in a process of its own whose threads can be counted."""

import subprocess
import sys

_PREPARING = """
import threading, torch
from pathlib import Path
from luthier.modeling.packed_memory import SpareMemory
torch.get_num_threads()
torch.set_num_threads(4)
spare = SpareMemory()
spare.take(8 << 20)
before, meanwhile = set(Path("/proc/self/task").iterdir()), set()
def run():
    spare.prepare()
    meanwhile.update(Path("/proc/self/task").iterdir())
thread = threading.Thread(target=run)
thread.start()
thread.join()
assert spare.num_bytes == 8 << 20
assert len(meanwhile - before) == 1, meanwhile - before
"""


def test_to_prepare_memory_makes_no_team_of_threads() -> None:
    # An operator of torch would make one in each thread that calls it, and teams get in each other's way.
    subprocess.run([sys.executable, "-c", _PREPARING], check=True, timeout=60)
