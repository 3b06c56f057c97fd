"""Output of commands: tables for people, JSON for programs. Control characters in users' text are escaped."""

import json
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any

# A cell of an item's row: a field of it, a field and how it is written, or a function of the item.
Column = str | tuple[str, Callable[[Any], object]] | Callable[[dict[str, Any]], object]
Columns = dict[str, Column]


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False))


def printable(text: object) -> str:
    """Return text with control characters (ANSI sequences, line breaks) made visible."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(text)
    )


def size(num_bytes: int | None) -> str:
    """Return a number of bytes such as `12.3 MiB`, or a dash."""
    if num_bytes is None:
        return "-"
    value = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} TiB"


def local_time(seconds: int | None) -> str:
    """Return a Unix time as local date and time, or a dash."""
    return "-" if seconds is None else datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def four_decimals(value: Any) -> str:
    """Return a fraction with four decimals, anything else as it is, or a dash."""
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def print_table(titles: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str) -> None:
    """Print rows under titles, or `empty` when there are none. Columns are never cut: ids can be copied."""
    cells = [[printable(cell) for cell in row] for row in rows]
    if not cells:
        print(empty)
        return
    widths = [max(len(row[i]) for row in [list(titles), *cells]) for i in range(len(titles))]
    for row in [list(titles), *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def print_list(items: Sequence[dict[str, Any]], columns: Columns, *, empty: str, as_json: bool) -> None:
    """Print a list of the service, as JSON or as a table of one row an item."""
    if as_json:
        print_json(items)
        return
    rows = [[_cell(item, column) for column in columns.values()] for item in items]
    print_table(list(columns), rows, empty=empty)


def _cell(item: dict[str, Any], column: Column) -> object:
    if callable(column):
        return column(item)
    key, form = (column, None) if isinstance(column, str) else column
    value = item.get(key)
    return "-" if value is None else form(value) if form else value


def print_object(item: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Print an object of the service, as JSON or as a text about it."""
    if as_json:
        print_json(item)
    else:
        print(text)
