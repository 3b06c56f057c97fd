"""Finding the trackers by folder: every file here that holds a `TRACKER`."""

import importlib
import pkgutil
from functools import cache
from pathlib import Path

from luthier.trackers.base import Tracker


@cache
def discover() -> dict[str, Tracker]:
    """Return every tracker by its name, in the order of the names. A new file is a new tracker."""
    package = __name__.rpartition(".")[0]
    found: dict[str, Tracker] = {}
    for info in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if info.name.startswith("_") or info.name == "base":
            continue
        tracker: Tracker = importlib.import_module(f"{package}.{info.name}").TRACKER
        found[tracker.name] = tracker
    return dict(sorted(found.items()))
