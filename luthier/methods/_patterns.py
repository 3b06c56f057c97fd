"""Regular expressions that users write, matched under a limit of time: a pattern may backtrack for ever."""

import time

import regex

MATCH_SECONDS = 2.0


def check_pattern(pattern: str) -> None:
    """Refuse what does not compile.

    Raises:
        ValueError: says what is wrong, as the end of a sentence that begins with the field.
    """
    try:
        regex.compile(pattern)
    except regex.error as error:
        raise ValueError(f"is no valid regular expression: {error}") from error
    except RecursionError as error:
        raise ValueError("is nested too deeply; use a simpler pattern") from error


def match_paths(pattern: str, paths: list[str]) -> list[str]:
    """Return the paths that a pattern, which compiles, matches as a whole, in their order.

    Raises:
        TimeoutError: when matching takes more than `MATCH_SECONDS`.
    """
    compiled = regex.compile(pattern)
    deadline = time.monotonic() + MATCH_SECONDS
    found = []
    for path in paths:
        seconds = max(deadline - time.monotonic(), 0.001)
        if compiled.fullmatch(path, timeout=seconds) is not None:
            found.append(path)
    return found
