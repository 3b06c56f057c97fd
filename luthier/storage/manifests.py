"""Sealed folders: every file's sha256 in a manifest that is written last.

A folder without a manifest that verifies does not exist: that is how save points, checkpoints, artifacts
and bases survive a crash at any moment. Only the local file system here; storage/store.py moves bytes.
"""

import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import BaseModel, ConfigDict, model_validator

from luthier.core.errors import ArtifactCorruptError

MANIFEST_NAME = "manifest.json"
_MAX_FILES = 10_000
_MAX_NAME_LENGTH = 200


def _is_file_name(name: str) -> bool:
    """Whether a manifest may name a file so: relative, within its folder, no unfinished file of a store."""
    is_plain = 0 < len(name) <= _MAX_NAME_LENGTH and name != MANIFEST_NAME and not set(name) & set("\0#\\")
    return is_plain and all(part not in ("", ".", "..") for part in name.split("/"))


class FileEntry(BaseModel):
    """One file of a folder; `sha256` is 64 hex digits.

    `pieces` are read alone: earlier versions hashed large files in pieces too, and their digests cover them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    sha256: str
    bytes: int
    pieces: list[str] | None = None


class Manifest(BaseModel):
    """The list of a folder's files and the digest that names its content.

    `digest` covers the files named in `digested` and `base_digest`; the others (card, log, report) are
    verified too but may differ between two folders of the same digest.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    digest: str
    base_digest: str | None
    digested: list[str]
    files: dict[str, FileEntry]

    @model_validator(mode="after")
    def _check_names(self) -> "Manifest":
        """Refuse names outside the folder: the manifest may be foreign."""
        if len(self.files) > _MAX_FILES:
            raise ValueError(f"a manifest names at most {_MAX_FILES} files")
        if not all(_is_file_name(name) for name in self.files):
            raise ValueError("a manifest names files within its folder, by at most 200 characters each")
        if not self.files.keys() >= set(self.digested):
            raise ValueError("the digest covers a file that the manifest does not name")
        return self

    def to_json(self) -> bytes:
        """Return the content of its file. Older readers refuse fields that they don't know."""
        return self.model_dump_json(indent=1, exclude_defaults=True).encode()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file as 64 hex digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def open_regular(root: Path, name: str) -> BinaryIO:
    """Open a regular file below a folder, following no link on the way.

    Raises:
        FileNotFoundError: when there is none; a link, a pipe or a socket is none.
    """
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    # Without O_NONBLOCK a named pipe would be waited for.
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        *folders, last = name.split("/")
        for folder in folders:
            below = os.open(folder, flags | os.O_DIRECTORY, dir_fd=descriptor)
            os.close(descriptor)
            descriptor = below
        stream = os.fdopen(os.open(last, flags, dir_fd=descriptor), "rb")
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            raise FileNotFoundError(errno.ENOENT, "no regular file", name) from error
        raise
    finally:
        os.close(descriptor)
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise FileNotFoundError(errno.ENOENT, "no regular file", name)
    return stream


def fsync_path(path: Path) -> None:
    """Force a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file_atomically(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    """Replace a file so that a reader, or a crash, sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    fsync_path(path.parent)


def compute_digest(files: dict[str, FileEntry], digested: Iterable[str], base_digest: str | None) -> str:
    """Return `sha256:…` over the named files' hashes and the base's digest, in canonical JSON."""
    names = sorted(digested)
    content: dict[str, Any] = {"base": base_digest, "files": {name: files[name].sha256 for name in names}}
    pieces = {name: found for name in names if (found := files[name].pieces) is not None}
    if pieces:
        content["pieces"] = pieces
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    return "sha256:" + hashlib.sha256(canonical).hexdigest()


def seal_folder(
    building: Path,
    final: Path,
    *,
    digested: Iterable[str] | None = None,
    base_digest: str | None = None,
    known: Mapping[str, FileEntry] | None = None,
) -> Manifest:
    """Make a finished folder durable: fsync its files, write the manifest last, rename into place.

    Args:
        building: the folder as it was written, a sibling of `final` on the same file system.
        final: its name from now on; an older folder of that name is replaced.
        digested: names of the files that the digest covers; all when None.
        base_digest: the base's digest, for folders whose meaning depends on one.
        known: entries of files that were verified just now, which are not hashed again.
    """
    files: dict[str, FileEntry] = {}
    for path in sorted(building.rglob("*")):
        if path.is_file() and path.name != MANIFEST_NAME:
            fsync_path(path)
            name = path.relative_to(building).as_posix()
            entry = (known or {}).get(name)
            files[name] = entry or FileEntry(sha256=file_sha256(path), bytes=path.stat().st_size)
    names = sorted(files) if digested is None else sorted(digested)
    manifest = Manifest(
        digest=compute_digest(files, names, base_digest),
        base_digest=base_digest,
        digested=names,
        files=files,
    )
    write_file_atomically(building / MANIFEST_NAME, manifest.to_json())
    if final.exists():
        shutil.rmtree(final)
    building.rename(final)
    fsync_path(final.parent)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest without checking the files.

    Raises:
        ArtifactCorruptError: when there is none or it can't be read.
    """
    try:
        return Manifest.model_validate_json((folder / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactCorruptError(f"{folder.name} has no manifest that can be read.") from error


def is_file_of(path: Path, entry: FileEntry) -> bool:
    """Whether a file is there and has the size and the sha256 of an entry."""
    try:
        # A link may lead out of the folder, and what it leads to may change.
        status = path.lstat()
    except OSError:
        return False
    is_file = stat.S_ISREG(status.st_mode) and status.st_size == entry.bytes
    return is_file and file_sha256(path) == entry.sha256


def verify_folder(folder: Path) -> Manifest:
    """Read a folder's manifest and check every file's size and sha256, and the digest.

    Raises:
        ArtifactCorruptError: when the manifest is absent, or a file is missing, changed or unlisted in size.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        if not is_file_of(folder / name, entry):
            raise ArtifactCorruptError(f"{folder.name}/{name} does not match its manifest.")
    if compute_digest(manifest.files, manifest.digested, manifest.base_digest) != manifest.digest:
        raise ArtifactCorruptError(f"The digest in the manifest of {folder.name} does not match its files.")
    return manifest
