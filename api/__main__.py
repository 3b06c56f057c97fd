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
# By default a thread that computes may keep the interpreter from the event loop for 5 ms at each of its
# system calls, and a loop that passes streams on makes some for every event.
_SWITCH_SECONDS = 0.0005
# Answers that last longer end with an error while there is time to tell it.
_ANSWER_SECONDS = 4


class _Server(uvicorn.Server):
    """A server that ends its event streams first: uvicorn waits for open answers before it stops."""

    def __init__(self, config: uvicorn.Config, state: AppState) -> None:
        super().__init__(config)
        self._state = state
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, and remember the loop for the signals."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_signal_handler(signal.SIGHUP, self._read_catalogue)
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, streams first; uvicorn calls this from its signal handler, on the loop's thread."""
        self._state.hub.close_streams()
        # A signal may come before the start; nobody waits for an answer then.
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end_answers_soon)
        super().handle_exit(sig, frame)

    def _read_catalogue(self) -> None:
        self._state.catalogue = read_again(self._state.settings.models_file, self._state.catalogue)

    def _end_answers_soon(self) -> None:
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end_answers())

    async def _end_answers(self) -> None:
        """Leave the inference servers; whoever still waits for one of them is told that it broke off."""
        await asyncio.sleep(_ANSWER_SECONDS)
        await self._state.backend.aclose()


def main() -> None:
    """Serve until TERM or INT."""
    parser = argparse.ArgumentParser(prog="python -m api")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    # Training processes run as the same user.
    hide_memory()
    settings = Settings()
    configure_logs(settings.log_level)
    raise_open_file_limit()
    sys.setswitchinterval(_SWITCH_SECONDS)
    # An estimate takes one processor from the streams, not all of them.
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
