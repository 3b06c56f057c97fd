"""Faults of our own in the log: what kind and where, never their own text, which may quote a prompt."""

import logging
import traceback


def log_fault(logger: logging.Logger, what: str, error: BaseException) -> None:
    """Log a fault that no `LuthierError` names.

    Args:
        logger: the caller's.
        what: what failed, as the beginning of a sentence.
        error: the fault.
    """
    places = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s failed with %s:\n%s", what, type(error).__name__, places)
