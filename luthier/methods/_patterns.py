"""Regular expressions that users write: refused when they are built to backtrack, matched under a limit.

Python's matching can take exponential time and can't be interrupted in its own process. So it never
runs in ours.
"""

import json
import re
import signal
import subprocess
import sys

MATCH_SECONDS = 2.0

# Python's start is not the pattern's fault, so a slow machine gets this much on top.
_START_SECONDS = 10.0
_MATCHER = """
import json, re, signal, sys
pattern, paths, seconds = json.load(sys.stdin)
signal.setitimer(signal.ITIMER_REAL, seconds)
compiled = re.compile(pattern)
json.dump([path for path in paths if compiled.fullmatch(path)], sys.stdout)
"""
_REPETITION = re.compile(r"[*+]|\{\d*,\d*\}|\{\d+\}")


def check_pattern(pattern: str) -> None:
    """Refuse what does not compile, or is built to backtrack.

    Raises:
        ValueError: says what is wrong, as the end of a sentence that begins with the field.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"is no valid regular expression: {error}") from error
    if nests_quantifiers(pattern):
        raise ValueError("repeats a group that holds a repetition; use a simpler pattern")


def nests_quantifiers(pattern: str) -> bool:
    """Whether a repeated group holds a repetition, which is how matching becomes exponential.

    Returns:
        True for such as `(a+)+`; `(a+)?` is none, for it repeats nothing.
    """
    open_groups: list[bool] = [False]
    position, is_group = 0, False
    while position < len(pattern):
        character = pattern[position]
        quantifier = _REPETITION.match(pattern, position)
        if quantifier:
            if is_group:
                return True
            # A fixed number, {3}, leaves nothing to try within a group.
            open_groups[-1] |= not quantifier[0].strip("{}").isdigit()
            position = quantifier.end()
            continue
        is_group = False
        if character == "\\":
            position += 1
        elif character == "[":
            position = _end_of_set(pattern, position)
        elif character == "(":
            open_groups.append(False)
        elif character == ")":
            is_group = open_groups.pop()
            open_groups[-1] |= is_group
        position += 1
    return False


def match_paths(pattern: str, paths: list[str]) -> list[str]:
    """Return the paths that a pattern matches as a whole.

    Returns:
        The matching ones, in their order.

    Raises:
        TimeoutError: when matching takes more than `MATCH_SECONDS`.
    """
    question = json.dumps([pattern, paths, MATCH_SECONDS])
    command = [sys.executable, "-I", "-S", "-c", _MATCHER]
    try:
        done = subprocess.run(
            command,
            input=question,
            capture_output=True,
            text=True,
            check=True,
            timeout=MATCH_SECONDS + _START_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise TimeoutError from error
    except subprocess.CalledProcessError as error:
        if error.returncode == -signal.SIGALRM:
            raise TimeoutError from error
        raise
    return [str(path) for path in json.loads(done.stdout)]


def _end_of_set(pattern: str, start: int) -> int:
    """Return where the `]` of a set of characters stands; one that comes first is a member."""
    position = start + 1
    if pattern[position : position + 1] == "^":
        position += 1
    if pattern[position : position + 1] == "]":
        position += 1
    while position < len(pattern) and pattern[position] != "]":
        position += 2 if pattern[position] == "\\" else 1
    return position
