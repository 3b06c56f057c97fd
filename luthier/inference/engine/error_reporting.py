"""Faults of our own in the log: what kind and where, never their own text, which may quote a prompt."""

import logging
import traceback

from luthier.core.errors import LuthierError


def log_fault(logger: logging.Logger, what: str, error: BaseException) -> None:
    """Log a fault that no `LuthierError` names.

    Args:
        what: what failed, as the beginning of a sentence.
    """
    places = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s failed with %s:\n%s", what, type(error).__name__, places)


def to_client_error(logger: logging.Logger, what: str, error: BaseException) -> LuthierError:
    """Return what whoever asked is told of an error; a fault that no `LuthierError` names is logged.

    Args:
        what: what failed, as the beginning of a sentence.

    Returns:
        The error itself where it is one that users are told.
    """
    if isinstance(error, LuthierError):
        return error
    log_fault(logger, what, error)
    return LuthierError("The model server failed on this request; the operator's log says why.")
