"""Lines of a file of rows. One place says what a line is, for uploads and for prepare alike."""

_BOM = b"\xef\xbb\xbf"


def clean_line(line: bytes, number: int) -> bytes:
    """Return a line without its carriage return and, on line 1 (`number`), without a byte order mark."""
    if number == 1:
        line = line.removeprefix(_BOM)
    return line.removesuffix(b"\r")


def is_blank(line: bytes) -> bool:
    """Whether a line holds nothing but spaces and tabs."""
    return not line.strip(b" \t\r")
