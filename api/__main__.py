"""`python -m api`: run the API under uvicorn."""

import argparse
from types import FrameType

import uvicorn

from api.deps import Parts
from api.main import create_app, make_parts
from luthier.core.garbage import freeze_garbage
from luthier.core.logs import configure_logs
from luthier.core.settings import Settings

_GRACEFUL_SECONDS = 5


class _Server(uvicorn.Server):
    """A server that ends its event streams first: uvicorn waits for open answers before it stops."""

    def __init__(self, config: uvicorn.Config, parts: Parts) -> None:
        super().__init__(config)
        self._parts = parts

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop, streams first; uvicorn calls this from its signal handler, on the loop's thread."""
        self._parts.hub.close_streams()
        super().handle_exit(sig, frame)


def main() -> None:
    """Serve until TERM or INT."""
    parser = argparse.ArgumentParser(prog="python -m api")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    settings = Settings()
    configure_logs(settings.log_level)
    parts = make_parts(settings)
    config = uvicorn.Config(
        create_app(parts),
        host=arguments.host,
        port=arguments.port,
        log_level=settings.log_level,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=_GRACEFUL_SECONDS,
    )
    freeze_garbage()
    _Server(config, parts).run()


if __name__ == "__main__":
    main()
