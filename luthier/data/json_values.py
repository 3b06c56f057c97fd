"""A bound on the number of values of a JSON text before it is parsed: each takes fifty bytes."""

# Limit of one request or row: token ids of a batch of prompts are the most that a client needs.
MAX_VALUES = 250_000


def max_num_values(text: bytes) -> int:
    """Return a number of values that a JSON text has at most.

    Commas within strings are left out only when the count is above MAX_VALUES with them.
    """
    found = _count_separators(text)
    if found <= MAX_VALUES:
        return found
    without_escapes = text.replace(b"\\\\", b"").replace(b'\\"', b"")
    num_quotes = without_escapes.count(b'"')
    if num_quotes > 4 * MAX_VALUES:
        # Each value and each name is one string at most.
        return num_quotes // 2
    return _count_separators(b"".join(without_escapes.split(b'"')[::2]))


def _count_separators(text: bytes) -> int:
    return 1 + sum(text.count(separator) for separator in (b",", b"[", b"{"))
