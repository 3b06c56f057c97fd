"""Measured cells in one JSON file, stored one by one so that a long measurement can be taken up again."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cell:
    """One measurement: which model, on which task, with which settings and seed.

    `model` is a method's name or `base`; `recipe` is `auto`, a hand-set recipe's name, or for the base
    `0-shot` or `4-shot`.
    """

    task: str
    model: str
    recipe: str
    seed: int


@dataclass(frozen=True)
class Size:
    """How large a measurement is; cells of different sizes are never compared. `epochs` None is "auto"."""

    rows: int
    questions: int
    epochs: int | None


class Results:
    """The file of results.

    Args:
        path: the file; made with the first cell.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: list[dict[str, Any]] = []
        if path.is_file():
            self._entries = json.loads(path.read_text(encoding="utf-8"))["cells"]

    def find(self, cell: Cell, size: Size) -> dict[str, Any] | None:
        """Return what was measured for a cell, or None."""
        return next((entry for entry in self._entries if _is_of(entry, cell, size)), None)

    def of_size(self, size: Size) -> list[dict[str, Any]]:
        """Return every entry of one size."""
        return [entry for entry in self._entries if entry["size"] == asdict(size)]

    def store(self, cell: Cell, size: Size, measured: dict[str, Any]) -> None:
        """Keep a cell's measurement, instead of an older one; the file is whole at every moment."""
        self._entries = [entry for entry in self._entries if not _is_of(entry, cell, size)]
        self._entries.append({**asdict(cell), "size": asdict(size), **measured})
        self._path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(json.dumps({"cells": self._entries}, indent=1) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self._path)


def _is_of(entry: dict[str, Any], cell: Cell, size: Size) -> bool:
    return entry["size"] == asdict(size) and all(entry[name] == value for name, value in asdict(cell).items())
