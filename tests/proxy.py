"""A proxy before PostgreSQL's Unix socket that can stall: it takes what is sent and passes nothing on."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

_SOCKET_NAME = ".s.PGSQL.5432"


class StallingProxy:
    """Passes bytes both ways between its own socket, in a folder with a short path, and the server's."""

    def __init__(self, folder: Path, server_folder: Path) -> None:
        self._target = str(server_folder / _SOCKET_NAME)
        self._passes = threading.Event()
        self._passes.set()
        self._sockets: list[socket.socket] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(folder / _SOCKET_NAME))
        self._listener.listen(64)
        threading.Thread(target=self._accept, daemon=True).start()

    def stall(self) -> None:
        """Pass nothing on from now on, neither to the server nor from it; close nothing."""
        self._passes.clear()

    def heal(self) -> None:
        """Pass all on that came meanwhile."""
        self._passes.set()

    def close(self) -> None:
        """End every connection."""
        self.heal()
        for each in [self._listener, *self._sockets]:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                server.connect(self._target)
                self._sockets += [client, server]
                for source, target in ((client, server), (server, client)):
                    threading.Thread(target=self._pump, args=(source, target), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(65536):
                self._passes.wait()
                target.sendall(content)
            target.shutdown(socket.SHUT_WR)


@contextlib.contextmanager
def stalling_proxy(folder: Path, server_folder: Path) -> Iterator[StallingProxy]:
    """Run a proxy before the server whose socket is in a folder."""
    proxy = StallingProxy(folder, server_folder)
    try:
        yield proxy
    finally:
        proxy.close()
