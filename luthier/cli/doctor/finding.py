"""The finding of one check."""

from dataclasses import dataclass
from typing import Literal

NOT_RUNNING = "not running"
START_ADVICE = "start it with `luthier up`"


@dataclass(frozen=True)
class Finding:
    """The outcome of one check; `advice` says what to do and is empty when all is well."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    advice: str = ""


def not_running(name: str) -> Finding:
    """Return the finding of a check that needs the running service."""
    return Finding(name, "warn", NOT_RUNNING, START_ADVICE)
