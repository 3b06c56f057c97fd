"""Logs unexpected exceptions without their message, which may quote a prompt."""

import logging
import traceback

from luthier.core.errors import LuthierError


def log_fault(logger: logging.Logger, what: str, error: BaseException) -> None:
    """Log an unexpected exception."""
    places = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s failed with %s:\n%s", what, type(error).__name__, places)


def to_client_error(logger: logging.Logger, what: str, error: BaseException) -> LuthierError:
    """Convert an exception to the error that the client gets. An unexpected one is logged."""
    if isinstance(error, LuthierError):
        return error
    log_fault(logger, what, error)
    return LuthierError("The model server failed on this request; the operator's log says why.")
