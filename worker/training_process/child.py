"""The training process: started without secrets, in its own process group, and killed with its parent.

It runs as the worker's user and can read what that user can. The memory and environment of worker and API are
hidden from it, and paths in its events must be in its run directory. The parent never imports torch. It reads
the child's event lines and signals it: TERM asks for a save point and a clean end, KILL ends it at once.
"""

import contextlib
import os
import selectors
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING

import structlog
from pydantic import ValidationError

from luthier.core.errors import SelfCheckError
from luthier.core.events import TrainingEvent, parse_event
from luthier.core.runtime import BARE_VARIABLES, CHILD_LOG_NAME, tied_python

if TYPE_CHECKING:
    from worker.training_process.fork_server import ForkedRun, ForkServer

_log = structlog.get_logger()

# The environment of a training process: no database, broker, storage or API secret.
_ALLOWED_VARIABLES = frozenset(
    BARE_VARIABLES
    | {"USER", "TMPDIR"}
    | {"XDG_CACHE_HOME", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES"}
    | {"OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "NUMBA_CACHE_DIR", "TRITON_CACHE_DIR"}
    | {"CUDA_DEVICE_ORDER", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
)
_ALLOWED_PREFIXES = ("NCCL_",)
# An event may hold a whole report: some 50 evaluations with 5 long prompts and their answers each.
_MAX_LINE_BYTES = 16 * 1024 * 1024


def child_environment(num_threads: int) -> dict[str, str]:
    allowed = {
        name: value
        for name, value in os.environ.items()
        if name in _ALLOWED_VARIABLES or name.startswith(_ALLOWED_PREFIXES)
    }
    return allowed | {
        "OMP_NUM_THREADS": str(num_threads),
        # numpy's own products are small, and a process forks best without the threads that it would start.
        "OPENBLAS_NUM_THREADS": "1",
        # Threads that wait must soon sleep: beside a busy inference server on the same cores, spinning ones
        # made a step fifteen times slower. Not before the next kernel comes, some 50 us later, or most
        # kernels begin by waking them.
        "GOMP_SPINCOUNT": "5000",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


class TrainingChild:
    """A running training process over one run directory.

    Args:
        respawn: starts another over the same directory, or returns None where that won't do; asked once,
            and only when the process ends before its first event without a signal.
    """

    def __init__(
        self,
        process: "subprocess.Popen[bytes] | ForkedRun",
        respawn: "Callable[[], subprocess.Popen[bytes] | None] | None" = None,
    ) -> None:
        self._selector = selectors.DefaultSelector()
        self._buffer = b""
        self._respawn = respawn
        self._is_signalled = False
        # Signals come from other threads, and must not miss a process that takes this one's place.
        self._lock = threading.Lock()
        self._follow(process)

    def _follow(self, process: "subprocess.Popen[bytes] | ForkedRun") -> None:
        assert process.stdout is not None
        self._process = process
        self._stdout: IO[bytes] = process.stdout
        os.set_blocking(self._stdout.fileno(), False)
        self._selector.register(self._stdout, selectors.EVENT_READ)
        self._is_open = True

    @property
    def pid(self) -> int:
        """The process's id, which is also its group's."""
        return self._process.pid

    def poll_events(self, timeout_seconds: float) -> list[TrainingEvent]:
        """Wait for event lines; raises SelfCheckError for a line that is no event."""
        if not self._is_open:
            return []
        if not self._selector.select(timeout_seconds):
            return []
        chunk = self._stdout.read() or b""
        if chunk == b"":
            self._is_open = False
            self._replace_silent()
            return []
        self._respawn = None
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        if len(self._buffer) > _MAX_LINE_BYTES:
            raise SelfCheckError("The training process wrote a line that is no event.")
        try:
            return [parse_event(line) for line in lines if line]
        except ValidationError as error:
            raise SelfCheckError("The training process wrote a line that is no event.") from error

    def _replace_silent(self) -> None:
        """Replace a process that ended before its first event, where a respawn is given."""
        with self._lock:
            if self._respawn is None or self._is_signalled:
                return
            respawn, self._respawn = self._respawn, None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            exit_code = self._process.wait()
            fresh = respawn()
            if fresh is None:
                return
            _log.warning(
                "a process that had waited ended unused, a fresh one is started", exit_code=exit_code
            )
            self._selector.unregister(self._stdout)
            self._stdout.close()
            self._follow(fresh)

    def exit_code(self) -> int | None:
        """Return the exit code once the process has ended and all its lines were read, else None."""
        if self._is_open:
            return None
        return self._process.wait()

    def ask_to_stop(self) -> None:
        """Ask for the step to be finished, a save point and a clean end."""
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the process and all it started, now."""
        self.kill_group()
        self._process.wait()
        self._selector.close()
        self._stdout.close()

    def kill_group(self) -> None:
        """Send the end to the process and all it started, without waiting; safe from any thread."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        with self._lock, contextlib.suppress(ProcessLookupError):
            self._is_signalled = True
            os.killpg(self._process.pid, number)


@contextlib.contextmanager
def start_child(
    run_dir: Path, num_threads: int, fork_server: "ForkServer | None" = None
) -> Iterator[TrainingChild]:
    """Start a training process over a run directory; it is gone when the block ends.

    Must be called from the main thread: the kernel ties the child's life to the thread that made it.
    """
    child = _take(run_dir, num_threads, fork_server) if fork_server is not None else None
    if child is None:
        child = TrainingChild(_spawn(run_dir, num_threads))
    try:
        yield child
    finally:
        child.kill()


def _take(run_dir: Path, num_threads: int, fork_server: "ForkServer") -> TrainingChild | None:
    """Fork a run from the fork server, if there is one. If that dies just now, the run is spawned again."""
    before = _files_of(run_dir)
    process = fork_server.take(run_dir)
    if process is None:
        return None
    return TrainingChild(
        process, lambda: _spawn(run_dir, num_threads) if _files_of(run_dir) == before else None
    )


def _files_of(run_dir: Path) -> set[Path]:
    """Return the files of a run directory without the process's log."""
    return {path for path in run_dir.rglob("*") if path.name != CHILD_LOG_NAME}


def _spawn(run_dir: Path, num_threads: int) -> "subprocess.Popen[bytes]":
    with (run_dir / CHILD_LOG_NAME).open("ab") as log:
        return subprocess.Popen(
            tied_python("-m", "luthier.training", str(run_dir)),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            env=child_environment(num_threads),
            start_new_session=True,
        )
