"""A process of the stack as data, and spawning it: own session, own log, ended with its parent.

Spawn from the main thread only: the kernel's death signal follows the thread that spawned (prctl(2)).
"""

import os
import signal
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from logging.handlers import RotatingFileHandler
from pathlib import Path

from luthier.core.runtime import die_with_parent

_MAX_LOG_BYTES = 10 * 1024 * 1024
_NUM_OLD_LOGS = 3


@dataclass(frozen=True)
class UnixUser:
    """The user that a process runs as."""

    uid: int
    gid: int


@dataclass(frozen=True)
class ProcessSpec:
    """A process that is kept running, or a step. Those of one stage are signalled together, lower first.

    `is_ready`: by default as soon as it runs. `prepare`: runs before every start. `stop_seconds`: after these
    the processes of a stage are killed. `death_signal`: sent by the kernel when the supervisor dies.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)
    is_ready: Callable[[], bool] = lambda: True
    prepare: Callable[[], None] | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    death_signal: signal.Signals = signal.SIGKILL
    stop_stage: int = 0
    stop_seconds: float = 2.0
    user: UnixUser | None = None
    folder: Path | None = None


def rotate_log(path: Path) -> None:
    """Rename a log of more than 10 MiB to NAME.log.1; three old ones are kept."""
    if path.exists() and path.stat().st_size >= _MAX_LOG_BYTES:
        RotatingFileHandler(path, backupCount=_NUM_OLD_LOGS, delay=True).doRollover()


def spawn(
    command: tuple[str, ...],
    *,
    environment: Mapping[str, str],
    log_path: Path,
    user: UnixUser | None = None,
    folder: Path | None = None,
    death_signal: signal.Signals = signal.SIGKILL,
) -> "subprocess.Popen[bytes]":
    """Start a process in its own session; the kernel sends it `death_signal` when this process dies.

    Its output is appended to the log. Without a user or a working folder it has this process's.
    """
    descriptor = os.open(log_path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            cwd=folder,
            start_new_session=True,
            user=user.uid if user else None,
            group=user.gid if user else None,
            extra_groups=[] if user else None,
            # The supervisor has one thread, so the work between fork and exec is safe.
            preexec_fn=partial(die_with_parent, os.getpid(), death_signal),  # noqa: PLW1509
        )
    finally:
        os.close(descriptor)


def signal_group(process: "subprocess.Popen[bytes]", number: signal.Signals) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        return


def log_tail(path: Path, *, num_lines: int = 12) -> str:
    """Return the last lines of a log, for an error message on the terminal."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - 8192))
            lines = stream.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "\n".join("  " + line for line in lines[-num_lines:])
