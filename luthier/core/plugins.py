"""Plugins: files of drop-in folders, and entry points of installed packages."""

import importlib
import logging
import pkgutil
from collections.abc import Iterable, Iterator
from importlib.metadata import entry_points
from typing import Any

_LOG = logging.getLogger(__name__)


def discover_plugins(package: str, folders: Iterable[str], attribute: str) -> dict[str, Any]:
    """Return the objects of a drop-in folder by their `name`, in the order of the names.

    Args:
        folders: the package's `__path__`.
        attribute: what each file calls its object. Files that begin with `_`, and base.py, are skipped.
    """
    found = {}
    for module in pkgutil.iter_modules(list(folders)):
        if module.name == "base" or module.name.startswith("_"):
            continue
        one = getattr(importlib.import_module(f"{package}.{module.name}"), attribute)
        found[one.name] = one
    return dict(sorted(found.items()))


def load_entry_points(group: str) -> Iterator[tuple[str, Any]]:
    """Yield names and objects of a group's entry points, those of other packages before Luthier's own.

    One that can't be imported is logged and skipped.
    """
    found = entry_points(group=group)
    for entry in sorted(
        found, key=lambda entry: (getattr(entry.dist, "name", None) == "luthier", entry.name)
    ):
        try:
            loaded = entry.load()
        except (ImportError, AttributeError) as error:
            _LOG.error("The plugin %s of %s can't be imported and is not used: %s", entry.name, group, error)
            continue
        yield entry.name, loaded
