"""Sealed folders in a second place without a second copy: their files are never changed again."""

import os
import shutil
from pathlib import Path

from luthier.storage.manifests import MANIFEST_NAME

# The manifest of the folder around it leaves out every file of a manifest's name.
_SEAL_NAME = "seal.json"


def link_folder(source: Path, destination: Path) -> None:
    """Link the files of a folder, which are never changed again, into a second one."""
    destination.mkdir()
    for path in sorted(source.rglob("*")):
        second = destination / path.relative_to(source)
        if path.is_dir():
            second.mkdir()
        else:
            _link(path, second)


def pack_folder(source: Path, destination: Path) -> None:
    """Put a sealed folder into another one that is yet to be sealed, its manifest by another name."""
    link_folder(source, destination)
    (destination / MANIFEST_NAME).rename(destination / _SEAL_NAME)


def unpack_folder(source: Path, destination: Path) -> None:
    """Take out what `pack_folder` put in."""
    link_folder(source, destination)
    (destination / _SEAL_NAME).rename(destination / MANIFEST_NAME)


def _link(source: Path, destination: Path) -> None:
    try:
        os.link(source, destination)
    except OSError:
        # Some file systems know no second names; a full one fails again here.
        shutil.copyfile(source, destination)
