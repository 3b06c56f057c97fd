"""Drop-in folder: one row format per file. Files that begin with `_`, and base.py, are skipped."""

import functools

from luthier.core.drop_ins import find_drop_ins
from luthier.data.formats.base import RowFormat


@functools.cache
def discover() -> dict[str, RowFormat]:
    """Return the formats of this folder by name, found by their files."""
    return find_drop_ins(__name__, __path__, "FORMAT")
