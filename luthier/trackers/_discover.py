"""Finding the trackers by folder: every file here that holds a `TRACKER`."""

from functools import cache
from pathlib import Path

from luthier.core.plugins import discover_plugins
from luthier.trackers.base import Tracker


@cache
def discover() -> dict[str, Tracker]:
    """Return every tracker by its name, in the order of the names. A new file is a new tracker."""
    return discover_plugins("luthier.trackers", [str(Path(__file__).parent)], "TRACKER")
