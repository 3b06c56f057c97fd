"""The environment of a training process, and memory that other processes can't read."""

import subprocess
import sys

from worker.training_process.child import child_environment

# As an ordinary user: nothing is hidden from root.
_PROGRAM = """
import ctypes, os, sys
sys.path.insert(0, sys.argv[1])
from luthier.core.runtime import hide_memory
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
    # A change of user hides memory too.
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
def read_as_a_child():
    sys.stdout.flush()
    if os.fork() == 0:
        try:
            open(f"/proc/{os.getppid()}/environ", "rb").read()
            print("read")
        except PermissionError:
            print("refused")
        sys.stdout.flush()
        os._exit(0)
    os.wait()
read_as_a_child()
hide_memory()
read_as_a_child()
"""


def test_a_child_can_not_read_the_environment_of_a_process_that_hides_its_memory():
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, "."], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.split() == ["read", "refused"]


def test_training_is_given_what_devices_need_and_no_secret(monkeypatch):
    wanted = ("PYTORCH_ALLOC_CONF", "CUDA_DEVICE_ORDER", "CUBLAS_WORKSPACE_CONFIG", "TRITON_CACHE_DIR")
    for name in (*wanted, "NCCL_DEBUG", "AWS_SECRET_ACCESS_KEY", "LUTHIER_DATABASE_URL", "HF_TOKEN"):
        monkeypatch.setenv(name, "x")
    environment = child_environment(1)
    assert {*wanted, "NCCL_DEBUG"} <= environment.keys()
    assert not {"AWS_SECRET_ACCESS_KEY", "LUTHIER_DATABASE_URL", "HF_TOKEN"} & environment.keys()
