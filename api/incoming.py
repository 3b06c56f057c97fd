"""Bytes on their way into storage, hashed, checked and written in blocks, with the memory of a few of them."""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from luthier.core.errors import LuthierError
from luthier.data.intake import Check
from luthier.data.validate import FileFacts
from luthier.storage.store import Storage

_BLOCK_BYTES = 1024 * 1024
# A client reads the answer only after it has sent its body: what is refused is still taken, and thrown
# away, for this long.
_DISCARD_SECONDS = 5.0


class StoredBytes(NamedTuple):
    """What came, checked: `sha256` is 64 hex digits over all of it."""

    num_rows: int
    num_bytes: int
    sha256: str


class Incoming:
    """An object on its way into storage.

    One block is hashed, checked and written, all three at once, while the next one gathers.

    Args:
        storage: where the bytes go.
        key: the object's key.
        max_bytes: the most that may come.
        too_large: what is raised when more comes.
    """

    def __init__(self, storage: Storage, key: str, *, max_bytes: int, too_large: LuthierError) -> None:
        self._storage = storage
        self._sink = storage.open_sink(key)
        self._max_bytes = max_bytes
        self._too_large = too_large
        self._check: Check | None = None
        self._sha256 = hashlib.sha256()
        # Joined once, when there is enough for a block.
        self._pieces: list[bytes] = []
        self._num_gathered = 0
        self._writing: asyncio.Task[None] | None = None
        self.num_bytes = 0

    def begin_check(self, check: Check) -> None:
        """Have all bytes checked; before the first of them."""
        self._check = check

    async def write(self, content: bytes) -> None:
        """Take the next bytes.

        Args:
            content: any number of bytes.

        Raises:
            LuthierError: when they are too many, or break a rule of the check; maybe only by a later call.
        """
        self.num_bytes += len(content)
        if self.num_bytes > self._max_bytes:
            raise self._too_large
        self._pieces.append(content)
        self._num_gathered += len(content)
        if self._num_gathered >= _BLOCK_BYTES:
            await self._flush()

    async def _flush(self) -> None:
        await self._settle()
        if self._pieces:
            block = b"".join(self._pieces)
            self._pieces.clear()
            self._num_gathered = 0
            self._writing = asyncio.create_task(self._write_block(block))

    async def _settle(self) -> None:
        """Wait for the block before; what went wrong with it is raised here."""
        writing, self._writing = self._writing, None
        if writing is not None:
            await writing

    async def _write_block(self, block: bytes) -> None:
        work = [self._sink.write(block)]
        if self._check is not None:
            # In threads: a large file must not hold up the other requests.
            work += [
                run_in_threadpool(self._check.feed, block),
                run_in_threadpool(self._sha256.update, block),
            ]
        # Each runs to its end, whatever becomes of the others: nothing goes on with a block after it.
        for outcome in await asyncio.gather(*work, return_exceptions=True):
            if outcome is not None:
                raise outcome

    async def close(self) -> None:
        """Make the object exist, durably, unchecked."""
        await self._flush()
        await self._settle()
        await self._sink.close()

    async def finish(self) -> StoredBytes:
        """End the check and make the object exist, durably; when this fails, `abort` is to follow.

        Returns:
            What the check found, and the hash.

        Raises:
            LuthierError: when the bytes break a rule of the check.
        """
        check = self._check
        if check is None:
            raise RuntimeError("begin_check comes first")
        await self._flush()
        await self._settle()
        if check.needs_file:
            # Its bytes go first; what is refused is deleted again.
            await self._sink.close()
            facts = await run_in_threadpool(self._finish_stored, check)
        else:
            facts = await run_in_threadpool(check.finish)
            await self._sink.close()
        return StoredBytes(facts.num_rows, facts.num_bytes, self._sha256.hexdigest())

    def _finish_stored(self, check: Check) -> FileFacts:
        with self._storage.local_file(self._sink.key) as path:
            return check.finish(path)

    async def abort(self) -> None:
        """Leave nothing behind."""
        try:
            with suppress(LuthierError):
                await self._settle()
        finally:
            await self._sink.abort()


@asynccontextmanager
async def receiving(
    request: Request,
    storage: Storage,
    key: str,
    *,
    max_bytes: int,
    max_body_bytes: int,
    too_large: LuthierError,
) -> AsyncIterator[tuple[Incoming, AsyncIterator[bytes]]]:
    """Take bytes of a request into storage; when the block fails, nothing of them stays.

    Args:
        request: its body not yet read.
        storage: where the bytes go.
        key: the object's key.
        max_bytes: the most that the object may have.
        max_body_bytes: the most that the whole body may be declared to have.
        too_large: what is raised when it is more.

    Yields:
        The object on its way, and the body's chunks to be parsed into it.
    """
    # One iterator for parsing and discarding: a body can be asked for only once.
    chunks = request.stream()
    declared = request.headers.get("content-length", "")
    try:
        if declared.isdecimal() and int(declared) > max_body_bytes:
            raise too_large
        incoming = Incoming(storage, key, max_bytes=max_bytes, too_large=too_large)
        try:
            yield incoming, chunks
        except BaseException:
            # Shielded: a client that leaves cancels this request, and its bytes must go all the same.
            await asyncio.shield(incoming.abort())
            raise
    except LuthierError:
        await discard_rest(chunks)
        raise


async def discard_rest(chunks: AsyncIterator[bytes]) -> None:
    """Read what a client still sends, for a few seconds, so that it gets to read its answer."""
    deadline = time.monotonic() + _DISCARD_SECONDS
    try:
        async for _ in chunks:
            if time.monotonic() > deadline:
                return
    except ClientDisconnect:
        return
