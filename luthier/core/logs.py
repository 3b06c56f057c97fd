"""Logs: one JSON object a line on standard error, without any text of users' data."""

import logging
import sys
import traceback
from pathlib import Path
from typing import Any

import structlog


def configure_logs(level: str) -> None:
    """Send structlog's and the standard library's logs to standard error as JSON lines."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _without_text,
    ]
    structlog.configure(
        processors=[*shared, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    for library in ("httpx2", "httpcore2"):
        # They log every URL, and at `debug` every header: a webhook's may hold a receiver's token.
        logging.getLogger(library).setLevel(logging.WARNING)


def _without_text(
    _logger: Any, _method: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Replace an exception by its types and frames: its text may quote a row, a prompt or a key."""
    found = event.pop("exc_info", None)
    if found is True:
        found = sys.exc_info()
    error = found[1] if isinstance(found, tuple) else found
    if not isinstance(error, BaseException):
        return event
    frames = traceback.extract_tb(error.__traceback__)
    event["trace"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
    event["error_type"] = type(error).__name__
    cause = error.__cause__ or error.__context__
    if cause is not None:
        event["caused_by"] = type(cause).__name__
    return event


def origin(error: BaseException) -> dict[str, str]:
    """Return the type of an error and where it was raised: its text may hold a user's words or a key."""
    frames = traceback.extract_tb(error.__traceback__)
    raised_at = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].name}" if frames else ""
    return {"error_type": type(error).__name__, "raised_at": raised_at}
