"""The fast lane of an upload's check: whole blocks of plain chat rows, as programs write them, at once.

A block passes when it is, byte for byte, what its own rows look like written plainly: then every key is
there once, and every line is a row that `luthier/data/formats/chat.py` takes. Whatever else a row may be
(other spacing or order of keys, text parts, tools, faults) is left to the check of single lines.
"""

from typing import Annotated, Literal

import msgspec

_QUOTE = ord('"')
_ROLES = ("system", "developer", "user", "assistant")


class _Message(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    role: Literal["system", "developer", "user", "assistant"]
    # Skipped over, with its escapes checked, and not made a text.
    content: msgspec.Raw
    name: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    weight: Literal[0, 1] | msgspec.UnsetType = msgspec.UNSET


class _Row(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    messages: Annotated[list[_Message], msgspec.Meta(min_length=1)]


_DECODER = msgspec.json.Decoder(_Row)


class _Style:
    """How a program writes rows: `separator` follows a comma, `space` a colon; `newline` ends a line."""

    def __init__(self, space: bytes, newline: bytes) -> None:
        comma, colon = b"," + space, b":" + space
        self.start = b'{"messages"' + colon + b'[{"role"' + colon
        content = b'"' + comma + b'"content"' + colon
        self.first = {role: self.start + b'"' + role.encode() + content for role in _ROLES}
        self.next = {
            role: b"}" + comma + b'{"role"' + colon + b'"' + role.encode() + content for role in _ROLES
        }
        self.name = comma + b'"name"' + colon
        self.weights = (comma + b'"weight"' + colon + b"0", comma + b'"weight"' + colon + b"1")
        self.end = b"}]}" + newline


_STYLES = [_Style(space, newline) for space in (b" ", b"") for newline in (b"\n", b"\r\n")]


def _find_style(block: bytes) -> _Style | None:
    for style in _STYLES:
        if block.startswith(style.start) and block.endswith(style.end):
            return style
    return None


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _write(rows: list[_Row], style: _Style, *, is_ascii: bool) -> bytes | None:
    """Return rows as a program writes them; None when one breaks a rule of the format."""
    pieces: list[bytes] = []
    append = pieces.append
    # Names that are looked up thousands of times a block.
    unset, first, following, end, quote = msgspec.UNSET, style.first, style.next, style.end, _QUOTE
    for row in rows:
        heads = first
        for message in row.messages:
            content = bytes(message.content)
            if content[0] != quote or not (is_ascii or content.isascii() or _is_utf8(content)):
                return None
            append(heads[message.role])
            append(content)
            if message.name is not unset:
                name = bytes(message.name)
                if name[0] != quote or not (is_ascii or _is_utf8(name)):
                    return None
                append(style.name)
                append(name)
            if message.weight is not unset:
                if message.role != "assistant":
                    return None
                append(style.weights[message.weight])
            heads = following
        if row.messages[-1].role != "assistant":
            return None
        append(end)
    return b"".join(pieces)


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
    try:
        rows = _DECODER.decode_lines(block)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    return len(rows) if _write(rows, style, is_ascii=block.isascii()) == block else None
