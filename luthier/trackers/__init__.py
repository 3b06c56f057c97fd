"""Drop-in folder: one tracker of experiments per file, but for those that begin with `_`, and base.py."""

from luthier.trackers._checking import check_integrations
from luthier.trackers.base import Tracker, discover

__all__ = ["Tracker", "check_integrations", "discover"]
