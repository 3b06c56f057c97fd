"""Bytes on their way into storage: hashed, checked and written in blocks, with the memory of a few."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from luthier.core.errors import LuthierError
from luthier.data.readers.file_checker import FileFacts
from luthier.data.readers.upload_check import UploadCheck
from luthier.storage.store import Storage

_BLOCK_BYTES = 1024 * 1024
# So many blocks may wait for each kind of work: none of them stands still while the others do theirs.
_MAX_WAITING_BLOCKS = 3
# A client reads the answer only after it has sent its body: what is refused is still taken, and thrown
# away, for this long.
_DISCARD_SECONDS = 5.0


class StoredBytes(NamedTuple):
    """What came, checked: `sha256` is 64 hex digits over all of it, `format` as in FileFacts."""

    num_rows: int
    num_bytes: int
    sha256: str
    format: str | None


class _Work:
    """One kind of work on an object's blocks, in their order, beside whatever else is done with them.

    Args:
        do: does it with the blocks that have gathered meanwhile.
    """

    def __init__(self, do: Callable[[Sequence[bytes]], Awaitable[None]]) -> None:
        self._do = do
        self._waiting: list[bytes] = []
        self._task: asyncio.Task[None] | None = None
        self._has_room = asyncio.Event()

    async def _run(self) -> None:
        try:
            while self._waiting:
                blocks, self._waiting = self._waiting, []
                self._has_room.set()
                await self._do(blocks)
        finally:
            self._has_room.set()

    async def put(self, block: bytes) -> None:
        """Have a block worked on, once there is room; what went wrong with one before is raised here."""
        while len(self._waiting) >= _MAX_WAITING_BLOCKS and self._task is not None and not self._task.done():
            self._has_room.clear()
            await self._has_room.wait()
        if self._task is not None and self._task.done():
            await self.settle()
        self._waiting.append(block)
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def settle(self) -> None:
        """Wait for all that was put; what went wrong with it is raised here, once."""
        task, self._task = self._task, None
        if task is not None:
            await task


class Incoming:
    """An object on its way into storage: blocks are hashed, checked and written while the next ones gather.

    Args:
        storage: where the bytes go.
        max_bytes: the most that may come.
        too_large: what is raised when more comes.
    """

    def __init__(self, storage: Storage, key: str, *, max_bytes: int, too_large: LuthierError) -> None:
        self._storage = storage
        self._sink = storage.open_sink(key)
        self._works = [_Work(self._write_blocks)]
        self._max_bytes = max_bytes
        self._too_large = too_large
        self._check: UploadCheck | None = None
        self._sha256 = hashlib.sha256()
        # Joined once, when there is enough for a block.
        self._pieces: list[bytes] = []
        self._num_gathered = 0
        self.num_bytes = 0

    def begin_check(self, check: UploadCheck) -> None:
        """Have all bytes checked and hashed; before the first of them."""
        self._check = check

        # In threads: a large file must not hold up the other requests.
        def feed(blocks: Sequence[bytes]) -> Awaitable[None]:
            return run_in_threadpool(_each, check.feed, blocks)

        def hash_blocks(blocks: Sequence[bytes]) -> Awaitable[None]:
            return run_in_threadpool(_each, self._sha256.update, blocks)

        self._works += [_Work(feed), _Work(hash_blocks)]

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
        if self._pieces:
            block = b"".join(self._pieces)
            self._pieces.clear()
            self._num_gathered = 0
            for work in self._works:
                await work.put(block)

    async def _settle(self) -> None:
        """Wait for all work on all blocks, and only then raise what went wrong."""
        outcomes = await asyncio.gather(*(work.settle() for work in self._works), return_exceptions=True)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    async def _write_blocks(self, blocks: Sequence[bytes]) -> None:
        for block in blocks:
            await self._sink.write(block)

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
        if await run_in_threadpool(lambda: check.needs_file):
            # Its bytes go first; what is refused is deleted again.
            await self._sink.close()
            facts = await run_in_threadpool(self._finish_stored, check)
        else:
            facts = await run_in_threadpool(check.finish)
            await self._sink.close()
        await run_in_threadpool(check.close)
        return StoredBytes(facts.num_rows, facts.num_bytes, self._sha256.hexdigest(), facts.format)

    def _finish_stored(self, check: UploadCheck) -> FileFacts:
        with self._storage.local_file(self._sink.key) as path:
            return check.finish(path)

    async def abort(self) -> None:
        """Leave nothing behind."""
        try:
            if self._check is not None:
                # Who waits for it in a thread is not waited for.
                self._check.stop()
            with suppress(LuthierError):
                await self._settle()
        finally:
            if self._check is not None:
                await run_in_threadpool(self._check.close)
            await self._sink.abort()


def _each(do: Callable[[bytes], object], blocks: Sequence[bytes]) -> None:
    for block in blocks:
        do(block)


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
    with suppress(ClientDisconnect, TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            async for _ in chunks:
                pass
