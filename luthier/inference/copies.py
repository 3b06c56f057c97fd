"""Copies of artifacts on the local disk: fetched, verified, dropped when unused for long.

A copy is worth nothing: it may vanish or be damaged at any time and is then fetched again.
"""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from luthier.core.errors import ArtifactCorruptError
from luthier.storage.manifests import MANIFEST_NAME, Manifest, read_manifest, verify_folder
from luthier.storage.store import Storage

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


# A file's name, size, times of change (of content and of the rest) in ns, and place on the disk.
_Stamp = tuple[str, int, int, int, int]


@dataclass(frozen=True)
class Copy:
    """A copy that was verified, and what its files looked like right before."""

    folder: Path
    digest: str
    stamps: tuple[_Stamp, ...]

    def check(self) -> None:
        """Make sure that the copy is still what was verified; only files that were touched cost a reading.

        Raises:
            ArtifactCorruptError: when it is not.
        """
        try:
            is_untouched = _stamp(self.folder, [name for name, *_ in self.stamps]) == self.stamps
        except OSError:
            is_untouched = False
        if not is_untouched and verify_folder(self.folder).digest != self.digest:
            raise ArtifactCorruptError("The artifact's local copy was replaced by another.")


def fetch_artifact(storage: Storage, prefix: str, digest: str, cache_dir: Path) -> Copy:
    """Make sure that an artifact lies in the cache, verified. Blocks; never call it on the engine's thread.

    Args:
        storage: where artifacts are published.
        prefix: the artifact's folder there.
        digest: the digest that its manifest must have.
        cache_dir: the server's own copies, one folder per digest.

    Returns:
        The verified copy.

    Raises:
        ArtifactCorruptError: when the stored bytes are missing, damaged or of another digest.
    """
    if not _DIGEST.fullmatch(digest):
        raise ArtifactCorruptError("The artifact's digest is malformed.")
    folder = cache_dir / digest.removeprefix("sha256:")
    copy = verify_copy(folder)
    if copy is None or copy.digest != digest:
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _sole_fetch(folder):
            # Another process may have fetched it meanwhile.
            copy = verify_copy(folder)
            if copy is None or copy.digest != digest:
                copy = _stamp_copy(folder, storage.fetch_folder(prefix, folder))
    if copy.digest != digest:
        shutil.rmtree(folder, ignore_errors=True)
        raise ArtifactCorruptError("The stored artifact is not the one that the model was published with.")
    return copy


@contextlib.contextmanager
def _sole_fetch(folder: Path) -> Iterator[None]:
    """Keep other processes that share the cache from writing the same copy meanwhile."""
    # A few locks for all copies, beside their folder: deleted ones would let two hold one.
    lock = folder.parent.with_name(f".{folder.parent.name}-{folder.name[0]}.lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def verify_copy(folder: Path) -> Copy | None:
    """Return the copy in a folder whose files are all as published, None for any other folder."""
    if not folder.is_dir():
        return None
    try:
        # Before the files are read: a change meanwhile must not go unseen.
        copy = _stamp_copy(folder, read_manifest(folder))
        return copy if verify_folder(folder).digest == copy.digest else None
    except ArtifactCorruptError:
        # A damaged copy is no loss: the published one is fetched again.
        return None


def _stamp_copy(folder: Path, manifest: Manifest) -> Copy:
    try:
        return Copy(folder, manifest.digest, _stamp(folder, [*sorted(manifest.files), MANIFEST_NAME]))
    except OSError as error:
        raise ArtifactCorruptError("The artifact's local copy vanished.") from error


def _stamp(folder: Path, names: list[str]) -> tuple[_Stamp, ...]:
    facts = [(name, (folder / name).stat()) for name in names]
    return tuple((name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in facts)


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
