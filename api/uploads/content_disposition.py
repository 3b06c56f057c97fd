"""The header Content-Disposition: parsed from forms, built for answers.

Sources: RFC 7578 (forms), RFC 2231 and 5987 (`filename*`), RFC 6266 (answers), and the HTML standard, whose
clients encode a quote as %22.
"""

import re
import unicodedata
from pathlib import PurePosixPath
from urllib.parse import quote, unquote_to_bytes

from luthier.core.errors import InvalidValueError

MAX_FILENAME_CHARACTERS = 255
_UNNAMED = "upload"

_PARAMETER = re.compile(r';\s*([^\s=;"]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^;]*)', re.DOTALL)
_ESCAPED = re.compile(r'\\(["\\])')
_CONTINUED = re.compile(r"filename\*(\d{1,3})(\*?)")
# The encodings of RFC 5987; a name in another one is read from the parameter `filename` instead.
_CHARSETS = {"utf-8": "utf-8", "iso-8859-1": "iso-8859-1", "us-ascii": "utf-8", "": "utf-8"}


def _decode_header(header: bytes) -> str:
    try:
        return header.decode("utf-8")
    except UnicodeDecodeError:
        # Old clients send the letters of western Europe raw, one byte each.
        return header.decode("iso-8859-1")


def _unquote(value: str) -> str:
    value = value.strip()
    if len(value) < 2 or not value.startswith('"') or not value.endswith('"'):
        return value
    return _ESCAPED.sub(r"\1", value[1:-1]).replace("%22", '"')


def _decode_extended(value: str) -> str | None:
    """Return the text of `charset'language'percent-encoded`, or None when malformed."""
    charset, _, rest = value.strip().strip('"').partition("'")
    _, quote_mark, encoded = rest.partition("'")
    known = _CHARSETS.get(charset.lower())
    if not quote_mark or known is None:
        return None
    try:
        return unquote_to_bytes(encoded).decode(known)
    except UnicodeDecodeError:
        return None


def _join_continued(parameters: dict[str, str]) -> str | None:
    """Return a name in numbered pieces (RFC 2231, 3), or None without any."""
    pieces = {
        int(match[1]): (bool(match[2]), value)
        for name, value in parameters.items()
        if (match := _CONTINUED.fullmatch(name))
    }
    if 0 not in pieces:
        return None
    charset, content = "utf-8", b""
    for number in range(len(pieces)):
        if number not in pieces:
            break
        is_encoded, value = pieces[number]
        if is_encoded and number == 0:
            given, _, rest = value.strip().partition("'")
            charset, value = _CHARSETS.get(given.lower(), "utf-8"), rest.partition("'")[2]
        content += unquote_to_bytes(value.strip()) if is_encoded else _unquote(value).encode()
    return content.decode(charset, "replace")


def parse_disposition(header: bytes) -> tuple[str, str | None]:
    """Return the field name of a part of a form, and its file name; None when the part is not a file."""
    parameters: dict[str, str] = {}
    for match in _PARAMETER.finditer(_decode_header(header)):
        parameters.setdefault(match[1].lower(), match[2])
    name = _unquote(parameters.get("name", ""))
    filename = _decode_extended(parameters.get("filename*", "")) or _join_continued(parameters)
    if filename is None and "filename" in parameters:
        filename = _unquote(parameters["filename"])
    if filename is None and "filename*" in parameters:
        filename = _UNNAMED
    return name, filename


def clean_filename(name: str, *, param: str) -> str:
    """Return a file's name without control characters, or `upload` for an empty one.

    A path is kept: nothing opens it. Raises InvalidValueError for more than 255 characters.
    """
    kept = "".join(c for c in name if unicodedata.category(c) != "Cc")
    if len(kept) > MAX_FILENAME_CHARACTERS:
        raise InvalidValueError(
            f"{param}: the file's name has {len(kept)} characters; use at most {MAX_FILENAME_CHARACTERS}.",
            param=param,
        )
    return kept or _UNNAMED


def content_disposition(filename: str) -> str:
    """Return the header of a download saved under a name, or the last part of a path, in any script.

    It has an ASCII name for every client and, where that differs, the true one (RFC 6266, 4.3).
    """
    last = PurePosixPath(filename.replace("\\", "/")).name
    if last in ("", ".", ".."):
        last = "file"
    ascii_name = "".join(c if c.isascii() and c.isprintable() and c not in '"%' else "_" for c in last)
    header = f'attachment; filename="{ascii_name}"'
    return header if ascii_name == last else f"{header}; filename*=UTF-8''{quote(last, safe='')}"
