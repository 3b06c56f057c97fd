"""`python -m luthier.inference.server`: the inference server's process: socket, signals, log.

On a Unix socket its mode (0600) is the guard, on TCP the internal token is.
"""

import asyncio
import contextlib
import errno
import logging
import os
import signal
import socket
import stat
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

# Set before transformers is imported: everything this process reads is on the local disk.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# OpenMP threads spin while they wait for each other, some milliseconds by default; where another process has
# a core, the spinning one takes what is left from the one it waits for, and a step takes ten times as long.
# They spin a fraction of a millisecond, then sleep. With 100,000 turns, 16 undisturbed LoRA streams are
# faster by a tenth (`python -m benchmarks.serve --row lora-16`), and pauses beside uploads longer by up
# to 0.4 s (`python -m benchmarks.hostile`): the pauses count.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import torch
import uvicorn
from uvicorn.loops.auto import auto_loop_factory

from luthier.core.errors import LuthierError
from luthier.core.http_limits import limited_protocol, raise_open_file_limit
from luthier.core.logs import configure_logs
from luthier.core.runtime import freeze_garbage
from luthier.core.settings import Settings
from luthier.inference.engine.engine import Engine
from luthier.inference.server.app import Service, build_app

_LOG = logging.getLogger(__name__)

# Of a step, or of a model that is put into place between two.
_MAX_STALL_SECONDS = 120.0
# EX_SOFTWARE of sysexits.h.
_EXIT_DEAD = 70
_BACKLOG = 1024
_STOP_SECONDS = 2
_SWITCH_SECONDS = 0.0005


def open_socket(url: str) -> socket.socket:
    """Bind the socket that a setting names.

    Args:
        url: `unix:///path.sock` or `http://host:port`.

    Returns:
        The bound socket; a Unix socket has mode 0600 from its first moment.

    Raises:
        LuthierError: when the URL is of another kind, or the path is in use by another server or no socket.
    """
    if "," in url:
        raise LuthierError(
            "LUTHIER_INFERENCE_URL names several servers. Each process of luthier.inference.server gets its "
            "own one; the list is for the API."
        )
    parts = urlsplit(url)
    if parts.scheme == "unix":
        return _open_unix_socket(Path(parts.netloc + parts.path))
    if parts.scheme == "http" and parts.hostname and parts.port is not None:
        family = socket.AF_INET6 if ":" in parts.hostname else socket.AF_INET
        return socket.create_server((parts.hostname, parts.port), family=family, backlog=_BACKLOG)
    raise LuthierError("LUTHIER_INFERENCE_URL must be unix:///path.sock or http://host:port.")


def _open_unix_socket(path: Path) -> socket.socket:
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    previous = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise LuthierError(f"The socket {path} can't be made: {error}.") from error
    finally:
        os.umask(previous)
    return listener


def _remove_stale(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise LuthierError(f"{path} exists and is no socket; LUTHIER_INFERENCE_URL must name another path.")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        if probe.connect_ex(str(path)) not in (errno.ECONNREFUSED, errno.ENOENT):
            raise LuthierError(f"Another inference server listens on {path}.")
    path.unlink(missing_ok=True)


class _Server(uvicorn.Server):
    """Uvicorn, but a signal also ends open answers, and the exit status after TERM is 0."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stop on TERM and INT."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        # The API and workers read models.toml again; this process reads nothing of it.
        loop.add_signal_handler(signal.SIGHUP, lambda: None)
        yield

    def _on_signal(self) -> None:
        self._service.interrupt()
        self.should_exit = True


def _exit_dead() -> None:
    """End the process, which would answer 503 for ever; its supervisor starts another."""
    _LOG.critical("The engine has ended; the process exits with status %d.", _EXIT_DEAD)
    logging.shutdown()
    os._exit(_EXIT_DEAD)


def serve(settings: Settings) -> None:
    """Serve until TERM or INT, and end the process.

    Raises:
        LuthierError: when the settings can't be served: no token for TCP, or a socket in use.
    """
    is_tcp = settings.inference_url.startswith("http://")
    token = settings.internal_token.get_secret_value() if is_tcp else None
    if token == "":
        raise LuthierError("LUTHIER_INTERNAL_TOKEN must be set when LUTHIER_INFERENCE_URL is http.")
    # The engine's thread alone has a team of threads. Were there a second one, for loading, OpenMP would see
    # more threads than processors and let all of them sleep at once wherever they wait, which doubles the
    # time of a step.
    torch.set_num_threads(1)
    # The engine's thread takes the GIL some hundred times a step; by default another thread may keep it for
    # 5 ms each time.
    sys.setswitchinterval(_SWITCH_SECONDS)
    listener = open_socket(settings.inference_url)
    socket_path = None if is_tcp else Path(listener.getsockname())
    engine = Engine(
        max_waiting=settings.max_waiting_requests,
        num_threads=settings.num_threads or max(1, (os.cpu_count() or 1) // settings.inference_processes),
        on_death=_exit_dead,
        stall_seconds=min(settings.stall_seconds, _MAX_STALL_SECONDS),
    )
    service = Service(settings, engine, freeze_garbage)
    config = uvicorn.Config(
        build_app(service, settings, token=token),
        log_config=None,
        access_log=False,
        server_header=False,
        # A Unix socket has its mode as guard, and the API alone behind it.
        http=limited_protocol(settings) if is_tcp else "httptools",
        ws="none",
        timeout_graceful_shutdown=_STOP_SECONDS,
    )
    # uvicorn's own choice, as in the API: uvloop where there is one.
    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        runner.get_loop().set_default_executor(
            ThreadPoolExecutor(thread_name_prefix="loading", initializer=torch.set_num_threads, initargs=(1,))
        )
        engine.start()
        _LOG.info("Serving on %s.", settings.inference_url)
        runner.run(_Server(config, service).serve(sockets=[listener]))
        engine.close()
        engine.join(timeout_seconds=0.5)
        if socket_path is not None:
            socket_path.unlink(missing_ok=True)
        logging.shutdown()
        # A step or a load in another thread may be deep in native code; waiting for it would break the
        # promise to stop at once, and nothing is left that needs an orderly end.
        os._exit(0)


def main() -> None:
    """Run the inference server."""
    settings = Settings()
    # Deprecations inside transformers and PEFT are no news for an operator.
    warnings.filterwarnings("ignore", category=FutureWarning)
    configure_logs(settings.log_level)
    raise_open_file_limit()
    try:
        serve(settings)
    except LuthierError as error:
        raise SystemExit(error.message) from error


if __name__ == "__main__":
    main()
