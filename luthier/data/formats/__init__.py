"""Drop-in folder: one row format per file. Files that begin with `_`, and base.py, are skipped."""

import functools
import importlib
import pkgutil

from luthier.data.formats.base import RowFormat


@functools.cache
def discover() -> dict[str, RowFormat]:
    """Return the formats of this folder by name, found by their files."""
    formats: dict[str, RowFormat] = {}
    for module_info in pkgutil.iter_modules(__path__):
        if module_info.name == "base" or module_info.name.startswith("_"):
            continue
        row_format: RowFormat = importlib.import_module(f"{__name__}.{module_info.name}").FORMAT
        formats[row_format.name] = row_format
    return formats
