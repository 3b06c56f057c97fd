"""Drop-in folders: each file of one holds an object of an agreed name, and a new file is the whole change."""

import importlib
import pkgutil
from collections.abc import Iterable
from typing import Any


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
