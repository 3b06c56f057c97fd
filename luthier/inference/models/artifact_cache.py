"""The cache of artifacts on the local disk: fetched, verified, evicted when unused.

A copy is worth nothing: it may vanish or be damaged at any time and is then fetched again. Where artifacts
are published on the same disk its files are second names of theirs, which costs nothing and outlives them.
"""

import contextlib
import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from luthier.core.errors import ArtifactCorruptError
from luthier.storage.manifests import (
    MANIFEST_NAME,
    Manifest,
    read_manifest,
    verify_folder,
    write_file_atomically,
)
from luthier.storage.store import Storage

# Seconds without use after which a copy of an earlier process may be dropped.
_ORPHAN_SECONDS = 600.0
# Beside a copy's files, which its manifest names.
_VERIFIED_NAME = ".verified.json"
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


# A file's name, size, times of change (of content and of the rest) in ns, and place on the disk.
_Stamp = tuple[str, int, int, int, int]


@dataclass
class CachedArtifact:
    """An artifact's files on this disk.

    `names` are those of its files and `prefix` is where it is published, None where that is not known;
    `stamps` are what the files looked like right before they were verified, None until then.
    """

    folder: Path
    digest: str
    names: tuple[str, ...]
    prefix: str | None = field(default=None, compare=False)
    stamps: tuple[_Stamp, ...] | None = field(default=None, compare=False)

    def check(self) -> None:
        """Make sure that the files are the artifact's; only those that were touched since cost a reading."""
        # Before they are read: a change meanwhile must not go unseen.
        stamps = self.look()
        if stamps is not None and stamps == self.stamps:
            return
        try:
            is_right = verify_folder(self.folder).digest == self.digest
        except OSError as error:
            raise ArtifactCorruptError("The artifact's local copy vanished.") from error
        if not is_right:
            raise ArtifactCorruptError("The artifact's local copy was replaced by another.")
        self.stamps = stamps

    def verified_with(self, base: str) -> str | None:
        """Return the type in which the artifact is served on a base, None until it was verified on it.

        Args:
            base: digest of what it is served on.
        """
        try:
            kept = json.loads((self.folder / _VERIFIED_NAME).read_bytes())
            return str(kept["dtype"]) if kept["base"] == base else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def note_verified(self, base: str, dtype: str) -> None:
        """Keep beside the copy that the artifact was verified in float32, and the type it is served in.

        Args:
            base: digest of what it is served on.
            dtype: bfloat16, or float32 where its check fails in bfloat16.
        """
        # A copy that is gone is fetched, and verified, again.
        with contextlib.suppress(OSError):
            content = json.dumps({"base": base, "dtype": dtype}).encode()
            write_file_atomically(self.folder / _VERIFIED_NAME, content)

    def look(self) -> tuple[_Stamp, ...] | None:
        """Return what the files look like; None when one is not there."""
        try:
            facts = [(name, (self.folder / name).stat()) for name in self.names]
        except OSError:
            return None
        return tuple((name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in facts)


def link_artifact(storage: Storage, prefix: str, digest: str, cache_dir: Path) -> CachedArtifact | None:
    """Give the files of an artifact that is published on the cache's disk a second name there.

    Nothing is read but the manifest: the copy is still to be checked.

    Returns:
        The copy, not verified; None where it must be fetched.
    """
    if storage.local_root is None or not _DIGEST.fullmatch(digest):
        return None
    published, folder = storage.local_root / prefix, cache_dir / digest.removeprefix("sha256:")
    try:
        if not folder.is_dir():
            copy = _copy_in(published)
            if copy.digest != digest or not published.resolve().is_relative_to(storage.local_root.resolve()):
                return None
            cache_dir.mkdir(parents=True, exist_ok=True)
            with _sole_fetch(folder):
                _link_files(published, copy.names, folder)
        copy = _copy_in(folder)
    except (OSError, ArtifactCorruptError):
        # On another disk, or damaged: fetching raises the reason.
        return None
    return replace(copy, prefix=prefix) if copy.digest == digest else None


def _link_files(published: Path, names: tuple[str, ...], folder: Path) -> None:
    building = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(building, ignore_errors=True)
    try:
        for name in names:
            (building / name).parent.mkdir(parents=True, exist_ok=True)
            if (published / name).is_symlink():
                raise ArtifactCorruptError(f"{name} is published as a link.")
            os.link(published / name, building / name)
        # Another process may have been first.
        if not folder.is_dir():
            building.rename(folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)


def fetch_artifact(storage: Storage, prefix: str, digest: str, cache_dir: Path) -> CachedArtifact:
    """Fetch an artifact into the cache and verify it. Blocks; never call it on the engine's thread.

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
                # They were hashed as they came, which says nothing of what was written.
                copy = _copy_of(folder, storage.fetch_folder(prefix, folder))
    if copy.digest != digest:
        shutil.rmtree(folder, ignore_errors=True)
        raise ArtifactCorruptError("The stored artifact is not the one that the model was published with.")
    return replace(copy, prefix=prefix)


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


def verify_copy(folder: Path) -> CachedArtifact | None:
    """Return the copy in a folder whose files are all as published, None for any other folder."""
    if not folder.is_dir():
        return None
    try:
        copy = _copy_in(folder)
        copy.check()
    except ArtifactCorruptError:
        # A damaged copy is no loss: the published one is fetched again.
        return None
    return copy


def _copy_in(folder: Path) -> CachedArtifact:
    return _copy_of(folder, read_manifest(folder))


def _copy_of(folder: Path, manifest: Manifest) -> CachedArtifact:
    return CachedArtifact(folder, manifest.digest, (*sorted(manifest.files), MANIFEST_NAME))


def mark_used(folder: Path) -> None:
    """Note that a copy is wanted now, so that others leave before it."""
    # A copy that is gone is missed when it is loaded, if it has to be.
    with contextlib.suppress(OSError):
        os.utime(folder)


def find_deleted(storage: Storage, copies: Iterable[CachedArtifact]) -> list[CachedArtifact]:
    """Return those of some copies whose artifact is not published any more. Blocks.

    Args:
        storage: where artifacts are published.
        copies: of which those that are not known to have been published anywhere are passed over.

    Raises:
        UnavailableError: when storage can't be used right now.
    """
    return [copy for copy in copies if copy.prefix is not None and not storage.has_folder(copy.prefix)]


def drop_orphans(storage: Storage, cache_dir: Path, known: Collection[str]) -> None:
    """Delete copies of earlier processes that were second names of files which have no other name now.

    Args:
        storage: where artifacts are published; only those on the cache's own disk are checked.
        known: digests of the copies that this process has had to do with, which stay.
    """
    root = storage.local_root
    if root is None or not root.is_dir() or not cache_dir.is_dir():
        return
    if root.stat().st_dev != cache_dir.stat().st_dev:
        return
    with os.scandir(cache_dir) as entries:
        folders = [Path(entry.path) for entry in entries if _DIGEST.fullmatch(f"sha256:{entry.name}")]
    for folder in folders:
        # Another process may drop it at the same moment.
        with contextlib.suppress(OSError):
            has_other_name = (folder / MANIFEST_NAME).stat().st_nlink > 1
            # One that another process has just fetched has one name too.
            is_idle = time.time() - folder.stat().st_mtime > _ORPHAN_SECONDS
            if f"sha256:{folder.name}" not in known and not has_other_name and is_idle:
                shutil.rmtree(folder, ignore_errors=True)


def drop_unused(cache_dir: Path, *, max_kept: int, in_use: set[str]) -> None:
    """Delete the copies unused for longest until no more than a number are left."""
    with os.scandir(cache_dir) as entries:
        copies = [entry for entry in entries if not entry.name.startswith(".") and entry.is_dir()]
    num_left = len(copies) - max_kept
    if num_left <= 0:
        return
    idle = [entry for entry in copies if f"sha256:{entry.name}" not in in_use]
    idle.sort(key=lambda entry: entry.stat().st_mtime_ns)
    for entry in idle[:num_left]:
        shutil.rmtree(entry.path, ignore_errors=True)
