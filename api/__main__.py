"""`python -m api`: run the API under uvicorn."""

import argparse
import asyncio
import os
import signal
import socket
import sys
from types import FrameType

import uvicorn

from api.deps import AppState
from api.main import create_app, make_app_state
from luthier.bases.catalogue import read_again
from luthier.core.http_limits import limited_protocol, raise_open_file_limit
from luthier.core.logs import configure_logs
from luthier.core.runtime import freeze_garbage, hide_memory
from luthier.core.settings import Settings

_GRACEFUL_SECONDS = 5
# The default of 5 ms lets a computing thread delay the event loop that long after each system call of the
# loop, and a relayed stream makes some for every event.
_SWITCH_SECONDS = 0.0005
# Answers that last longer end with an error event before the server stops.
_ANSWER_SECONDS = 4


class _Server(uvicorn.Server):
    """A server that ends its event streams first: uvicorn waits for open answers before it stops."""

    def __init__(self, config: uvicorn.Config, state: AppState) -> None:
        super().__init__(config)
        self._state = state
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and reload the catalogue on SIGHUP."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_signal_handler(signal.SIGHUP, self._reload_catalogue)
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End the streams, then stop. uvicorn calls this from its signal handler."""
        self._state.hub.close_streams()
        # A signal may arrive before the start.
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._start_ending)
        super().handle_exit(sig, frame)

    def _reload_catalogue(self) -> None:
        self._state.catalogue = read_again(self._state.settings.models_file, self._state.catalogue)

    def _start_ending(self) -> None:
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end_answers())

    async def _end_answers(self) -> None:
        """Disconnect from the inference servers: requests that still wait for one end with an error."""
        await asyncio.sleep(_ANSWER_SECONDS)
        await self._state.backend.aclose()


def main() -> None:
    """Serve until TERM or INT."""
    parser = argparse.ArgumentParser(prog="python -m api")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    # Training processes run as the same user, and could read it.
    hide_memory()
    settings = Settings()
    configure_logs(settings.log_level)
    raise_open_file_limit()
    sys.setswitchinterval(_SWITCH_SECONDS)
    # An estimate uses one processor, not all.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    state = make_app_state(settings)
    config = uvicorn.Config(
        create_app(state),
        host=arguments.host,
        port=arguments.port,
        log_level=settings.log_level,
        log_config=None,
        access_log=False,
        server_header=False,
        http=limited_protocol(settings),
        ws="none",
        timeout_graceful_shutdown=_GRACEFUL_SECONDS,
    )
    freeze_garbage()
    _Server(config, state).run()


if __name__ == "__main__":
    main()
