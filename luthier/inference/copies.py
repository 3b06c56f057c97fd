"""The server's own copies of artifacts on the local disk: fetched, verified, dropped when unused for long.

A copy is worth nothing: it may vanish or be damaged at any time and is then fetched again.
"""

import contextlib
import os
import re
import shutil
from pathlib import Path

from luthier.core.errors import ArtifactCorruptError
from luthier.storage.manifests import Manifest, verify_folder
from luthier.storage.store import Storage

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def fetch_artifact(storage: Storage, prefix: str, digest: str, cache_dir: Path) -> Path:
    """Make sure that an artifact lies in the cache, verified. Blocks; never call it on the engine's thread.

    Args:
        storage: where artifacts are published.
        prefix: the artifact's folder there.
        digest: the digest that its manifest must have.
        cache_dir: the server's own copies, one folder per digest.

    Returns:
        The local folder.

    Raises:
        ArtifactCorruptError: when the stored bytes are missing, damaged or of another digest.
    """
    if not _DIGEST.fullmatch(digest):
        raise ArtifactCorruptError("The artifact's digest is malformed.")
    folder = cache_dir / digest.removeprefix("sha256:")
    manifest = verify_copy(folder)
    if manifest is None or manifest.digest != digest:
        cache_dir.mkdir(parents=True, exist_ok=True)
        manifest = storage.fetch_folder(prefix, folder)
    if manifest.digest != digest:
        shutil.rmtree(folder, ignore_errors=True)
        raise ArtifactCorruptError("The stored artifact is not the one that the model was published with.")
    return folder


def verify_copy(folder: Path) -> Manifest | None:
    """Return the manifest of a copy whose files are all as published, None for any other folder."""
    if not folder.is_dir():
        return None
    try:
        return verify_folder(folder)
    except ArtifactCorruptError:
        # A damaged copy is no loss: the published one is fetched again.
        return None


def mark_used(folder: Path) -> None:
    """Note that a copy is wanted now, so that others leave before it."""
    # A copy that is gone is missed when it is loaded, if it has to be.
    with contextlib.suppress(OSError):
        os.utime(folder)


def drop_unused(cache_dir: Path, *, max_kept: int, in_use: set[str]) -> None:
    """Delete the copies unused for longest until no more than a number are left.

    Args:
        cache_dir: the server's copies, one folder per digest.
        max_kept: copies that may stay.
        in_use: digests whose copies stay in any case.
    """
    copies = [path for path in cache_dir.iterdir() if path.is_dir() and not path.name.startswith(".")]
    idle = [path for path in copies if f"sha256:{path.name}" not in in_use]
    idle.sort(key=lambda path: path.stat().st_mtime_ns)
    for path in idle[: max(0, len(copies) - max_kept)]:
        shutil.rmtree(path, ignore_errors=True)
