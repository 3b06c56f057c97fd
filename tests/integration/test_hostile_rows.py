"""An upload whose one line is as large as a line may be, in the shapes that are dearest to check, is answered
in seconds: the check of a row is linear in its bytes.

Seconds are the processor's, of this process and of those that it started, so that a busy machine fails none.
"""

import resource
import tracemalloc
from itertools import count

import pytest

from luthier.core.errors import InvalidFileFormatError
from luthier.data.readers.base import Limits
from luthier.data.readers.file_checker import check_rows
from tests.conftest import Api

LINE_BYTES = 8 * 1024 * 1024 - 1024
# A quiet machine takes 3 s at most.
MAX_PROCESSOR_SECONDS = 10.0

USER, ASSISTANT = b'{"role":"user","content":"x"}', b'{"role":"assistant","content":"x"}'
CALL = b'{"id":"c%d","type":"function","function":{"name":"f","arguments":"{}"}}'
ANSWER = b'{"role":"tool","tool_call_id":"a","content":"x"}'


def fill(item: bytes) -> bytes:
    """Return a line's worth of one item, between commas; a `%d` in it becomes its number."""
    items: list[bytes] = []
    num_bytes = 0
    for number in count():
        if num_bytes >= LINE_BYTES:
            return b",".join(items)
        items.append(item % number if b"%d" in item else item)
        num_bytes += len(items[-1]) + 1
    raise AssertionError


def chat(messages: bytes, rest: bytes = b"") -> bytes:
    return b'{"messages":[' + messages + b"]" + rest + b"}"


def preference(question: bytes, answers: bytes) -> bytes:
    outputs = b'"preferred_output":[' + answers + b'],"non_preferred_output":[' + answers + b"]"
    return b'{"input":{"messages":[' + question + b"]}," + outputs + b"}"


def calls(calls: bytes) -> bytes:
    return USER + b',{"role":"assistant","tool_calls":[' + calls + b"]}," + ASSISTANT


# Made when they are needed: together they are large.
SHAPES = {
    "a key twice among the last keys": lambda: b"{" + fill(b'"k%d":0') + b',"z":0,"z":0}',
    "messages that are none": lambda: chat(fill(b"{}")),
    "numbers for messages": lambda: chat(fill(b"1")),
    "calls that are none": lambda: chat(calls(fill(b"{}"))),
    "calls that nothing answers": lambda: chat(calls(fill(CALL))),
    "tools": lambda: chat(ASSISTANT, b',"tools":[' + fill(b"{}") + b"]"),
    "answers to no call, of a preference": lambda: preference(fill(ANSWER)[: -len(ANSWER) - 1], ASSISTANT),
    "lists in lists": lambda: chat(b"[" * LINE_BYTES),
    "long numbers": lambda: chat(fill(b"1" * 4000)),
    "one record of lines": lambda: b'prompt,completion\na,"' + b"\n" * LINE_BYTES,
}


def processor_seconds() -> float:
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_hostile_line_is_refused_in_seconds(shape: str, api: Api) -> None:
    line = SHAPES[shape]()[: 8 * 1024 * 1024]
    before = processor_seconds()
    answer = api.upload(line, timeout=120)
    taken = processor_seconds() - before
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_file_format"), answer.text
    assert len(answer.text) < 2000
    assert taken < MAX_PROCESSOR_SECONDS


@pytest.mark.parametrize("shape", ["messages that are none", "a key twice among the last keys", "tools"])
def test_a_line_of_millions_of_values_is_refused_before_they_are_made(shape: str) -> None:
    line = SHAPES[shape]()
    tracemalloc.start()
    try:
        with pytest.raises(InvalidFileFormatError, match="more than 250000 JSON values"):
            check_rows([line], Limits())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # The line a few times over; its values would be 200 MiB.
    assert peak < 6 * LINE_BYTES, f"{peak / LINE_BYTES:.1f}"
