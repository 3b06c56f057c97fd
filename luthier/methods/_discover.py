"""Finding the methods by folder: every file here that holds a `METHOD`."""

from functools import cache
from pathlib import Path

from luthier.core.errors import ArtifactCorruptError
from luthier.core.plugins import discover_plugins
from luthier.methods.base import Method


@cache
def discover() -> dict[str, Method]:
    """Return every method by its name, in the order of the names. A new file is a new method."""
    return discover_plugins("luthier.methods", [str(Path(__file__).parent)], "METHOD")


def method_of_artifact(folder: Path) -> Method:
    """Return the method that made an artifact.

    Raises:
        ArtifactCorruptError: when no method recognises it.
    """
    for method in discover().values():
        if method.recognises(folder):
            return method
    raise ArtifactCorruptError("The artifact's configuration names no known method.")
