"""The fast lane of an upload's check: whole blocks of plain chat rows, as programs write them, at once.

A block passes when every byte of it is accounted for: each line is `{"messages": [{"role": …, "content": …}`
and so on, spelled exactly so, around texts that are whole JSON strings. Then every key is there once, and
every line is a row that `luthier/data/formats/chat.py` takes. Whatever else a row may be (other spacing or
order of keys, text parts, tools, faults) is left to the check of single lines.

All is done on arrays of the places that matter (quotes, backslashes, line ends), and without Python's lock
for nearly all of the time: the next block is received meanwhile.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_Places = npt.NDArray[np.int64]
_Claims = npt.NDArray[np.bool_]

_NEWLINE, _QUOTE, _BACKSLASH, _FIRST_PRINTED, _FIRST_BEYOND_ASCII = 10, 34, 92, 32, 128
_ROLES = (b"system", b"developer", b"user", b"assistant")
_WORD_BYTES = 8
# Longer than anything that is looked for, so that it can be looked for at a block's last byte too.
_PADDING_BYTES = 64

# What may follow a backslash (RFC 8259, section 7), and which of it four digits follow.
_IS_ESCAPE = np.zeros(256, np.bool_)
_IS_ESCAPE[list(b'"\\/bfnrtu')] = True
_HEX_VALUES = np.full(256, 255, np.uint8)
for _digit in b"0123456789abcdefABCDEF":
    _HEX_VALUES[_digit] = int(chr(_digit), 16)


class _Style:
    """How a program writes rows: `space` follows each comma and colon; `newline` ends a line."""

    def __init__(self, space: bytes, newline: bytes) -> None:
        comma, colon = b"," + space, b":" + space
        self.newline = newline
        self.role = b'"role"' + colon
        self.start = b'{"messages"' + colon + b"[{"
        self.content = {
            role: b'"' + role + b'"' + comma + b'"content"' + colon + b'"' for role in _ROLES
        }
        self.name = b'"' + comma + b'"name"' + colon + b'"'
        self.weights = tuple(comma + b'"weight"' + colon + digit for digit in (b"0", b"1"))
        self.next = b"}" + comma + b"{"
        self.end = b"}]}" + newline


_STYLES = [_Style(space, newline) for space in (b" ", b"") for newline in (b"\n", b"\r\n")]


def _find_style(block: bytes) -> _Style | None:
    for style in _STYLES:
        if block.startswith(style.start + style.role) and block.endswith(style.end):
            return style
    return None


class _Text:
    """A block's bytes, and what stands at many of their places at once."""

    def __init__(self, block: bytes) -> None:
        self.codes = np.zeros(len(block) + _PADDING_BYTES, np.uint8)
        self.codes[: len(block)] = np.frombuffer(block, np.uint8)
        num_words = len(self.codes) - _WORD_BYTES + 1
        # The eight bytes that begin at each place, as one number.
        self._words = np.ndarray((num_words,), "<u8", self.codes.data, strides=(1,))

    def has(self, literal: bytes, places: _Places) -> _Claims:
        """Say of each place whether the literal begins there."""
        found = np.ones(len(places), np.bool_)
        for start in range(0, len(literal), _WORD_BYTES):
            piece = literal[start : start + _WORD_BYTES]
            words = self._words[places + start]
            if len(piece) < _WORD_BYTES:
                words &= np.uint64((1 << (8 * len(piece))) - 1)
            found &= words == np.uint64(int.from_bytes(piece, "little"))
        return found


@dataclass(frozen=True)
class _Marks:
    """Where the lines of a block end, and where its strings begin and end: their quotes."""

    line_ends: _Places
    opens: _Places
    closes: _Places


def _are_whole_characters(text: _Text, places: _Places) -> bool:
    """Whether four hex digits stand at each of the places, and halves of characters in pairs."""
    digits = _HEX_VALUES[text.codes[places[:, None] + np.arange(4)]]
    if (digits > 15).any():
        return False
    # D800 to DBFF is a first half, DC00 to DFFF a second one, which must follow at once.
    is_half = (digits[:, 0] == 0xD) & (digits[:, 1] >= 0x8)
    if not is_half.any():
        return True
    halves, is_second = places[is_half], digits[is_half, 1] >= 0xC
    return (
        len(halves) % 2 == 0
        and not is_second[0::2].any()
        and bool(is_second[1::2].all())
        and bool((halves[1::2] - halves[0::2] == len("\\uD800")).all())
    )


def _find_escapes(text: _Text, backslashes: _Places) -> _Places | None:
    """Return the backslashes that begin an escape; None when one is no escape of JSON's."""
    escapes = backslashes
    is_adjacent = np.diff(backslashes) == 1
    if is_adjacent.any():
        # Of backslashes in a row every other one is escaped itself.
        is_first = np.concatenate(([True], ~is_adjacent))
        first = np.maximum.accumulate(np.where(is_first, backslashes, 0))
        escapes = backslashes[(backslashes - first) % 2 == 0]
    kinds = text.codes[escapes + 1]
    if not _IS_ESCAPE[kinds].all():
        return None
    return escapes if _are_whole_characters(text, escapes[kinds == ord("u")] + 2) else None


def _find_marks(text: _Text, style: _Style) -> _Marks | None:
    """Find lines and strings; None when a string is none of JSON's, or a line end is not the style's."""
    codes = text.codes[:-_PADDING_BYTES]
    places = np.flatnonzero((codes == _QUOTE) | (codes == _BACKSLASH) | (codes < _FIRST_PRINTED))
    kinds = codes[places]
    line_ends = places[kinds == _NEWLINE]
    if np.count_nonzero(kinds < _FIRST_PRINTED) != len(line_ends) * len(style.newline):
        return None
    quotes, backslashes = places[kinds == _QUOTE], places[kinds == _BACKSLASH]
    if len(backslashes):
        escapes = _find_escapes(text, backslashes)
        if escapes is None:
            return None
        escaped = escapes[text.codes[escapes + 1] == _QUOTE] + 1
        quotes = np.delete(quotes, np.searchsorted(quotes, escaped))
    if len(quotes) % 2:
        return None
    return _Marks(line_ends, quotes[0::2], quotes[1::2])


def _is_utf8(block: bytes, codes: npt.NDArray[np.uint8], line_starts: _Places) -> bool:
    if block.isascii():
        return True
    is_beyond = np.maximum.reduceat(codes, line_starts) >= _FIRST_BEYOND_ASCII
    bounds = np.append(line_starts, len(block))
    try:
        for line in np.flatnonzero(is_beyond).tolist():
            block[bounds[line] : bounds[line + 1]].decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _are_rows(text: _Text, style: _Style, marks: _Marks, line_starts: _Places) -> bool:
    """Whether everything between the texts is what a program writes around them."""
    opens, closes = marks.opens, marks.closes
    # Each message begins with the string "role"; the role itself, "content" and the content follow.
    heads = np.flatnonzero(text.has(style.role, opens))
    if len(heads) == 0 or heads[0] != 1 or heads[-1] + 3 >= len(opens):
        return False
    roles, contents = opens[heads] + len(style.role), np.zeros(len(heads), np.int64)
    is_assistant = text.has(style.content[b"assistant"], roles)
    for role, literal in style.content.items():
        is_role = is_assistant if role == b"assistant" else text.has(literal, roles)
        contents[is_role] = roles[is_role] + len(literal) - 1
    if not (contents == opens[heads + 3]).all():
        return False
    # The message's last string, and the place behind what was read of it.
    lasts = heads + 3
    tails = closes[lasts] + 1
    named = np.flatnonzero(text.has(style.name, tails - 1))
    if len(named):
        lasts[named] += 2
        if lasts.max() >= len(opens) or not (opens[lasts[named]] == tails[named] + len(style.name) - 2).all():
            return False
        tails[named] = closes[lasts[named]] + 1
    for weight in style.weights:
        weighted = np.flatnonzero(text.has(weight, tails))
        if not is_assistant[weighted].all():
            return False
        lasts[weighted] += 1
        tails[weighted] += len(weight)
    # Message follows message, or the row ends and the next one begins, and no string is left over.
    is_end = text.has(style.end, tails)
    is_next = text.has(style.next, tails) & ~is_end
    following = np.append(heads[1:], len(opens) + 1)
    return bool(
        (is_end | is_next).all()
        and (following == lasts + np.where(is_end, 2, 1)).all()
        and (opens[following[is_next]] == tails[is_next] + len(style.next)).all()
        and is_assistant[is_end].all()
        and np.array_equal(tails[is_end] + len(style.end) - 1, marks.line_ends)
        and text.has(style.start, line_starts).all()
        and np.array_equal(opens[heads[np.append(True, is_end[:-1])]], line_starts + len(style.start))
    )


def count_plain_rows(block: bytes) -> int | None:
    """Count the rows of a block, all of which are plain and without a fault.

    Args:
        block: whole lines, each with its line end.

    Returns:
        How many; None when the block has anything else in it, which is no fault yet.
    """
    style = _find_style(block)
    if style is None:
        return None
    text = _Text(block)
    marks = _find_marks(text, style)
    if marks is None:
        return None
    line_starts = np.append(0, marks.line_ends[:-1] + 1)
    if not _are_rows(text, style, marks, line_starts):
        return None
    return len(marks.line_ends) if _is_utf8(block, text.codes[: len(block)], line_starts) else None
