"""The answer of a process that reads users' rows, on its standard output: a result, or an error without text.

An unexpected error is named by its kind and place alone: its text may quote a row.
"""

import sys
from collections.abc import Callable
from typing import TypeVar

import msgspec
from pydantic import TypeAdapter
from pydantic_core import to_json

from luthier.core.errors import LuthierError, UnavailableError
from luthier.core.logs import origin

_T = TypeVar("_T")


class Refusal(msgspec.Struct):
    """An error that is the file's or the base's: the name of its class, and its message."""

    error_type: str
    message: str


class _Answer(msgspec.Struct):
    result: msgspec.Raw = msgspec.Raw(b"null")
    refusal: Refusal | None = None
    error_type: str = ""
    raised_at: str = ""


def write_answer(compute: Callable[[], object], refusals: tuple[type[Exception], ...]) -> None:
    """Compute, and write what comes out on stdout; `refusals` are passed on with their messages."""
    try:
        answer = _Answer(msgspec.Raw(to_json(compute())))
    except refusals as error:
        message = error.message if isinstance(error, LuthierError) else ""
        answer = _Answer(refusal=Refusal(type(error).__name__, message))
    except Exception as error:  # noqa: BLE001 - the parent raises it
        found = origin(error)
        answer = _Answer(error_type=found["error_type"], raised_at=found["raised_at"])
    sys.stdout.buffer.write(msgspec.json.encode(answer))
    sys.stdout.buffer.flush()


def read_answer(content: bytes, kind: type[_T], did: str) -> _T | Refusal:
    """Read what `write_answer` wrote.

    Args:
        did: what the process did to the file's rows, for the error.

    Raises:
        UnavailableError: when there is no answer: the process has ended.
        RuntimeError: when it failed unexpectedly; names kind and place.
    """
    if not content:
        raise UnavailableError(
            f"The process that {did} the file's rows has ended; try again. Operator: see whether the machine "
            "is short of memory."
        )
    answer = msgspec.json.decode(content, type=_Answer)
    if answer.error_type:
        raise RuntimeError(
            f"The process that {did} the file's rows failed with {answer.error_type} at {answer.raised_at}."
        )
    return answer.refusal or TypeAdapter(kind).validate_json(bytes(answer.result))
