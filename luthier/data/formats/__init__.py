"""Drop-in folder: one row format per file. Files that begin with `_`, and base.py, are skipped."""

import functools

from luthier.core.plugins import discover_plugins
from luthier.data.formats.base import RowFormat


@functools.cache
def discover() -> dict[str, RowFormat]:
    """Return the formats of this folder by name, found by their files."""
    return discover_plugins(__name__, __path__, "FORMAT")
