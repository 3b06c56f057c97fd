"""Object storage: files and artifact folders over obstore, in a local folder or an S3-compatible service.

A folder is published files first, manifest last; what has no manifest that verifies does not exist.
Nothing here knows a row or a request.
"""

import asyncio
import errno
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO, Protocol
from urllib.parse import unquote, urlsplit

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    GenericError,
    NotFoundError,
    NotSupportedError,
    PermissionDeniedError,
    UnauthenticatedError,
    UnknownConfigurationKeyError,
)
from obstore.store import LocalStore, ObjectStore, from_url

from luthier.core.errors import (
    ArtifactCorruptError,
    LuthierError,
    StorageFullError,
    StorageRefusedError,
    UnavailableError,
)
from luthier.storage.manifests import (
    MANIFEST_NAME,
    Manifest,
    file_sha256,
    fsync_path,
    open_regular,
    read_manifest,
    verify_folder,
)

_CHUNK_BYTES = 1024 * 1024
# obstore raises its own error from S3 and the built-in one from a local folder.
_MISSING = (NotFoundError, FileNotFoundError)
# How obstore's local store calls an object that is not finished yet; it never lists them.
_UNFINISHED = re.compile(r"#\d+$")
# The writer keeps this much before it starts a multipart upload (S3 asks for at least 5 MiB a part).
_WRITER_BUFFER_BYTES = 8 * 1024 * 1024


# What an operator has to mend; a local folder raises Python's own kinds.
_REFUSALS = (
    PermissionDeniedError,
    UnauthenticatedError,
    NotSupportedError,
    UnknownConfigurationKeyError,
    PermissionError,
    NotADirectoryError,
    IsADirectoryError,
)
# A refusal that obstore has no kind for: an answer of S3 with another code of 400 to 499, or to go elsewhere.
_REFUSED_ANSWER = re.compile(r"status code: 4(?!08|29)\d\d|redirect", re.IGNORECASE)
_NOWHERE = (
    "The bucket or folder of files and models does not exist; the operator must check LUTHIER_STORAGE_URL."
)
_FULL = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def _answered() -> Iterator[None]:
    """Translate errors of storage; a missing object is the caller's to handle.

    Raises:
        StorageFullError: when a local disk is full.
        StorageRefusedError: when trying again does not help.
        UnavailableError: when it may.
    """
    try:
        yield
    except _MISSING:
        raise
    except (BaseError, OSError) as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            raise StorageFullError(
                "The disk of files and models is full; the operator must make room."
            ) from error
        is_refused = isinstance(error, _REFUSALS) or getattr(error, "errno", None) == errno.EROFS
        if is_refused or (isinstance(error, GenericError) and _REFUSED_ANSWER.search(str(error))):
            raise StorageRefusedError(
                f"The storage of files and models refuses what it is asked ({type(error).__name__}); the "
                "operator must check LUTHIER_STORAGE_URL, its credentials and rights."
            ) from error
        raise UnavailableError(
            "The storage of files and models can't be used right now; try again."
        ) from error


@contextmanager
def _written() -> Iterator[None]:
    """Do as `_answered`; on a write, what is missing is the bucket."""
    try:
        with _answered():
            yield
    except _MISSING as error:
        raise StorageRefusedError(_NOWHERE) from error


class Sink(Protocol):
    """An object being written; it exists under its key only after `close`."""

    key: str

    async def write(self, chunk: bytes) -> None:
        """Append bytes."""

    async def close(self) -> None:
        """Make the object exist, durably where the storage is a local folder."""

    async def abort(self) -> None:
        """Leave nothing behind."""


class _LocalSink:
    """A file that exists under its path only after `close`."""

    def __init__(self, path: Path, key: str) -> None:
        self.key = key
        self._path = path
        # `delete_unfinished` knows files of a dead process by this end of their names.
        self._unfinished = path.with_name(f"{path.name}#{secrets.randbits(63)}")
        self._file: BinaryIO | None = None
        # A cancelled writer may abort while its write still runs in a thread.
        self._lock = threading.Lock()
        self._is_aborted = False

    async def write(self, chunk: bytes) -> None:
        with _written():
            await asyncio.to_thread(self._write, chunk)

    async def close(self) -> None:
        # The flush of a file must not hold up the event loop.
        with _written():
            await asyncio.to_thread(self._close)

    async def abort(self) -> None:
        with _answered():
            await asyncio.to_thread(self._abort)

    def _write(self, chunk: bytes) -> None:
        with self._lock:
            if not self._is_aborted:
                self._open().write(chunk)

    def _close(self) -> None:
        """Make the file exist, durably: first its bytes, then its name."""
        with self._lock:
            if self._is_aborted:
                return
            file = self._open()
            file.flush()
            os.fsync(file.fileno())
            file.close()
            self._unfinished.replace(self._path)
        fsync_path(self._path.parent)

    def _abort(self) -> None:
        """Delete the file, also after `close`."""
        with self._lock:
            self._is_aborted = True
            if self._file is not None:
                # A full disk fails the flush of what is deleted anyway.
                with suppress(OSError):
                    self._file.close()
            self._unfinished.unlink(missing_ok=True)
            self._path.unlink(missing_ok=True)

    def _open(self) -> BinaryIO:
        if self._file is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._unfinished.open("xb")
        return self._file


class _RemoteSink:
    """A sink into any other store."""

    def __init__(self, objects: ObjectStore, key: str) -> None:
        self.key = key
        self._objects = objects
        self._writer = obstore.open_writer_async(
            objects, key, buffer_size=_WRITER_BUFFER_BYTES, max_concurrency=2
        )

    async def write(self, chunk: bytes) -> None:
        with _written():
            await self._writer.write(chunk)

    async def close(self) -> None:
        with _written():
            await self._writer.close()

    async def abort(self) -> None:
        # The writer has no way to drop what it holds, so what was written is finished and then deleted.
        with suppress(*_MISSING), _answered():
            if not await self._writer.closed():
                await self._writer.close()
            await obstore.delete_async(self._objects, self.key)


class Storage:
    """One root of objects. Keys are relative, `/`-separated, and made by this service only.

    `local_root` is the root folder when objects are local files, else None.
    """

    def __init__(self, objects: ObjectStore, local_root: Path | None) -> None:
        self.objects = objects
        self.local_root = local_root

    @classmethod
    def open(cls, url: str) -> "Storage":
        """Open the storage that a setting names.

        Args:
            url: `file:///folder` (made when absent; a relative `file://folder` is taken from the working
                folder) or `s3://bucket/prefix` with credentials in the usual AWS_* variables.

        Raises:
            LuthierError: when the scheme is unknown.
        """
        parts = urlsplit(url)
        if parts.scheme == "file":
            root = Path(unquote(parts.netloc + parts.path)).absolute()
            root.mkdir(parents=True, exist_ok=True)
            return cls(LocalStore(root), root)
        if parts.scheme == "s3":
            return cls(from_url(url), None)
        raise LuthierError(f"LUTHIER_STORAGE_URL: {parts.scheme!r} is neither file:// nor s3://.")

    def check_free(self, min_bytes: int) -> None:
        """Refuse to begin an object on a local disk that has less than `min_bytes` free.

        Raises:
            StorageFullError: when it has less.
        """
        if self.local_root is None:
            return
        with _answered():
            free = shutil.disk_usage(self.local_root).free
        if free < min_bytes:
            raise StorageFullError(
                f"The disk of files and models has {free} bytes free, and {min_bytes} are kept "
                "(LUTHIER_MIN_FREE_BYTES); the operator must make room."
            )

    def settle(self, key: str) -> None:
        """Force a local object to disk; obstore's local store leaves that to its caller."""
        if self.local_root is None:
            return
        path = self.local_root / key
        fsync_path(path)
        fsync_path(path.parent)

    def open_sink(self, key: str) -> Sink:
        """Begin an object that is written piece by piece."""
        if self.local_root is None:
            return _RemoteSink(self.objects, key)
        return _LocalSink(self.local_root / key, key)

    def put_bytes(self, key: str, content: bytes) -> None:
        with _written():
            obstore.put(self.objects, key, content)
            self.settle(key)

    async def stream(self, key: str, *, start: int, end: int) -> AsyncIterator[bytes]:
        """Yield the bytes `start` to `end` (exclusive) of an object, in chunks of about 1 MiB.

        Raises:
            ArtifactCorruptError: when the object is not there.
        """
        position = start
        while position < end:
            stop = min(position + _CHUNK_BYTES, end)
            try:
                with _answered():
                    chunk = await obstore.get_range_async(self.objects, key, start=position, end=stop)
            except _MISSING as error:
                raise ArtifactCorruptError("Stored bytes are missing; ask the operator to check.") from error
            yield bytes(chunk)
            position = stop

    def read_start(self, key: str, num_bytes: int) -> bytes:
        """Return an object's first bytes; it must have as many.

        Raises:
            ArtifactCorruptError: when the object is not there.
        """
        try:
            with _answered():
                return bytes(obstore.get_range(self.objects, key, start=0, end=num_bytes))
        except _MISSING as error:
            raise ArtifactCorruptError(f"The stored object {key} is missing.") from error

    def fetch_file(self, key: str, destination: Path, *, sha256: str | None = None) -> None:
        """Copy an object to a local file, which exists only when it is whole.

        Args:
            sha256: what its bytes must hash to, 64 hex digits; a mismatch is fetched once more.

        Raises:
            ArtifactCorruptError: when the object is not there or does not match.
        """
        self._copy(key, destination)
        if sha256 is None or file_sha256(destination) == sha256:
            return
        self._copy(key, destination)
        if file_sha256(destination) != sha256:
            destination.unlink()
            raise ArtifactCorruptError(f"The stored object {key} does not match its hash.")

    def _copy(self, key: str, destination: Path) -> None:
        destination.parent.mkdir(parents=True, exist_ok=True)
        temporary = destination.with_name(f".{destination.name}.part")
        try:
            with _answered():
                if self.local_root is not None:
                    with open_regular(self.local_root, key) as source, temporary.open("wb") as target:
                        shutil.copyfileobj(source, target, _CHUNK_BYTES)
                else:
                    with temporary.open("wb") as target:
                        for chunk in obstore.get(self.objects, key).stream(min_chunk_size=_CHUNK_BYTES):
                            target.write(chunk)
        except _MISSING as error:
            temporary.unlink(missing_ok=True)
            raise ArtifactCorruptError(f"The stored object {key} is missing.") from error
        temporary.replace(destination)

    @contextmanager
    def local_file(self, key: str) -> Iterator[Path]:
        """Hold an object as a local file, to be read only: itself where objects are such, else a copy.

        Raises:
            ArtifactCorruptError: when the object is not there.
        """
        if self.local_root is not None:
            held = self.local_root / key
            if not held.is_file():
                raise ArtifactCorruptError(f"The stored object {key} is missing.")
            yield held
            return
        with tempfile.TemporaryDirectory(prefix="luthier-object-") as folder:
            path = Path(folder) / "object"
            self._copy(key, path)
            yield path

    def delete(self, key: str) -> None:
        """Delete an object; one that is not there is no error."""
        with suppress(*_MISSING), _answered():
            obstore.delete(self.objects, key)

    def delete_prefix(self, prefix: str) -> None:
        """Delete every object under a prefix, the manifest first so that no half folder can pass for one."""
        self.delete(f"{prefix}/{MANIFEST_NAME}")
        for path in self._list(prefix):
            self.delete(path)
        if self.local_root is not None:
            shutil.rmtree(self.local_root / prefix, ignore_errors=True)

    def delete_all_but(self, prefix: str, kept_prefixes: Collection[str]) -> None:
        """Delete the objects under a prefix that are none of the kept ones, nor under one of them."""
        for path in self._list(prefix):
            if not any(path == kept or path.startswith(kept + "/") for kept in kept_prefixes):
                self.delete(path)
        self.delete_unfinished(prefix)

    def delete_unfinished(self, prefix: str, *, age_seconds: float = 0.0) -> None:
        """Delete unfinished files of dead processes in a local folder, if they are old enough."""
        if self.local_root is None:
            return
        newest = time.time() - age_seconds
        with _answered():
            for path in (self.local_root / prefix).rglob("*#*"):
                if _UNFINISHED.search(path.name) and path.is_file() and path.stat().st_mtime <= newest:
                    path.unlink(missing_ok=True)

    def list_prefixes(self, prefix: str) -> list[str]:
        """Return the prefixes one level below a prefix."""
        with _answered():
            try:
                return list(obstore.list_with_delimiter(self.objects, prefix + "/")["common_prefixes"])
            except _MISSING:
                return []

    def list_old(self, prefix: str, *, age_seconds: float) -> Iterator[str]:
        """Yield the keys under a prefix whose objects were last written at least `age_seconds` ago."""
        newest = datetime.now(UTC) - timedelta(seconds=age_seconds)
        with _answered():
            for batch in obstore.list(self.objects, prefix + "/"):
                yield from (meta["path"] for meta in batch if meta["last_modified"] <= newest)

    def _list(self, prefix: str) -> list[str]:
        with _answered():
            return [meta["path"] for batch in obstore.list(self.objects, prefix + "/") for meta in batch]

    def put_folder(self, folder: Path, prefix: str) -> Manifest:
        """Publish a sealed folder under a prefix: its files, then its manifest.

        Args:
            folder: a folder sealed by `seal_folder`; it is verified first.
            prefix: where it goes; a folder of the same digest that is there already is left alone.

        Raises:
            ArtifactCorruptError: when the folder does not match its manifest, or another one is there.
            UnavailableError: when storage can't be used right now.
        """
        manifest = verify_folder(folder)
        try:
            self._put_files(folder, prefix, manifest)
        except _MISSING as error:
            if all((folder / name).exists() for name in manifest.files):
                raise StorageRefusedError(_NOWHERE) from error
            raise
        return manifest

    def _put_files(self, folder: Path, prefix: str, manifest: Manifest) -> None:
        with _answered():
            for name in manifest.files:
                key = f"{prefix}/{name}"
                obstore.put(self.objects, key, folder / name)
                self.settle(key)
                if obstore.head(self.objects, key)["size"] != manifest.files[name].bytes:
                    raise ArtifactCorruptError(f"{name} was cut while it was published.")
            self._commit_manifest(folder, prefix, manifest)

    def _commit_manifest(self, folder: Path, prefix: str, manifest: Manifest) -> None:
        """Put the manifest if there is none: of two publishers of one prefix only the first commits."""
        key = f"{prefix}/{MANIFEST_NAME}"
        try:
            obstore.put(self.objects, key, folder / MANIFEST_NAME, mode="create")
        except (AlreadyExistsError, FileExistsError) as error:
            if self.read_manifest(prefix).digest != manifest.digest:
                raise ArtifactCorruptError(f"Another folder is published under {prefix}.") from error
        self.settle(key)

    def is_empty(self) -> bool:
        """Whether nothing is stored at all, as where a disk is not mounted."""
        with _answered():
            try:
                return not any(batch for batch in obstore.list(self.objects))
            except _MISSING:
                return True

    def has_folder(self, prefix: str) -> bool:
        """Whether a folder is published: its manifest exists."""
        with _answered():
            try:
                obstore.head(self.objects, f"{prefix}/{MANIFEST_NAME}")
            except _MISSING:
                return False
        return True

    def read_manifest(self, prefix: str) -> Manifest:
        """Read the manifest of a published folder.

        Raises:
            ArtifactCorruptError: when there is none, or it can't be read.
        """
        try:
            with _answered():
                content = obstore.get(self.objects, f"{prefix}/{MANIFEST_NAME}").bytes()
            return Manifest.model_validate_json(bytes(content))
        except (*_MISSING, ValueError) as error:
            raise ArtifactCorruptError(f"No artifact is published under {prefix}.") from error

    def fetch_folder(self, prefix: str, destination: Path) -> Manifest:
        """Copy a published folder, verified, to a local one, which is replaced and exists only when whole.

        Raises:
            ArtifactCorruptError: when a file is missing or does not match.
        """
        manifest = self.read_manifest(prefix)
        building = destination.with_name(f".{destination.name}.part")
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        for name, entry in manifest.files.items():
            self.fetch_file(f"{prefix}/{name}", building / name, sha256=entry.sha256)
        (building / MANIFEST_NAME).write_bytes(manifest.to_json())
        shutil.rmtree(destination, ignore_errors=True)
        building.rename(destination)
        return read_manifest(destination)
