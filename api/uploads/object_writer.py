"""Writes arriving bytes to storage: hashed, checked and written in blocks, in bounded memory."""

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
# Blocks that may wait for each stage, so that a slow stage does not stall the others.
_MAX_WAITING_BLOCKS = 3
# Clients read the answer only after sending their body: a refused one is read and discarded for this long.
_DISCARD_SECONDS = 5.0


class StoredBytes(NamedTuple):
    """A checked object: `sha256` in 64 hex digits, `row_format` as in FileFacts."""

    num_rows: int
    num_bytes: int
    sha256: str
    row_format: str | None


class _Stage:
    """One stage of the pipeline: processes an object's blocks in order, concurrently with other stages."""

    def __init__(self, process: Callable[[Sequence[bytes]], Awaitable[None]]) -> None:
        self._process = process
        self._waiting: list[bytes] = []
        self._task: asyncio.Task[None] | None = None
        self._has_room = asyncio.Event()

    async def _run(self) -> None:
        try:
            while self._waiting:
                blocks, self._waiting = self._waiting, []
                self._has_room.set()
                await self._process(blocks)
        finally:
            self._has_room.set()

    async def put(self, block: bytes) -> None:
        """Queue a block, once there is room. Raises the error of an earlier block."""
        while len(self._waiting) >= _MAX_WAITING_BLOCKS and self._task is not None and not self._task.done():
            self._has_room.clear()
            await self._has_room.wait()
        if self._task is not None and self._task.done():
            await self.settle()
        self._waiting.append(block)
        if self._task is None:
            self._task = asyncio.create_task(self._run())

    async def settle(self) -> None:
        """Wait for all queued blocks. Raises their error, once."""
        task, self._task = self._task, None
        if task is not None:
            await task


class ObjectWriter:
    """Writes an object: blocks are hashed, checked and stored while the next ones arrive.

    Args:
        too_large: raised beyond `max_bytes`.
    """

    def __init__(self, storage: Storage, key: str, *, max_bytes: int, too_large: LuthierError) -> None:
        self._storage = storage
        self._sink = storage.open_sink(key)
        self._stages = [_Stage(self._write_blocks)]
        self._max_bytes = max_bytes
        self._too_large = too_large
        self._check: UploadCheck | None = None
        self._sha256 = hashlib.sha256()
        # Joined once, when there is enough for a block.
        self._pieces: list[bytes] = []
        self._num_gathered = 0
        self.num_bytes = 0

    def begin_check(self, check: UploadCheck) -> None:
        """Check and hash all bytes. Called before the first of them."""
        self._check = check

        # In threads: a large file must not delay other requests.
        def feed(blocks: Sequence[bytes]) -> Awaitable[None]:
            return run_in_threadpool(_each, check.feed, blocks)

        def hash_blocks(blocks: Sequence[bytes]) -> Awaitable[None]:
            return run_in_threadpool(_each, self._sha256.update, blocks)

        self._stages += [_Stage(feed), _Stage(hash_blocks)]

    async def write(self, content: bytes) -> None:
        """Take the next bytes.

        Raises:
            LuthierError: when they are too many, or break a rule of the check; possibly by a later call only.
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
            for stage in self._stages:
                await stage.put(block)

    async def _settle(self) -> None:
        """Wait for all stages, and only then raise the first error."""
        outcomes = await asyncio.gather(*(stage.settle() for stage in self._stages), return_exceptions=True)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    async def _write_blocks(self, blocks: Sequence[bytes]) -> None:
        for block in blocks:
            await self._sink.write(block)

    async def close(self) -> None:
        """Commit the object durably, without a check."""
        await self._flush()
        await self._settle()
        await self._sink.close()

    async def finish(self) -> StoredBytes:
        """End the check and commit the object durably. Raises LuthierError when the bytes break a rule."""
        check = self._check
        if check is None:
            raise RuntimeError("begin_check comes first")
        await self._flush()
        await self._settle()
        if await run_in_threadpool(lambda: check.needs_file):
            # Stored before the check ends; a refused object is deleted again.
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
        try:
            if self._check is not None:
                # Before waiting for the stages: one may be blocked in a thread on the check.
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
async def writing(
    storage: Storage, key: str, *, max_bytes: int, too_large: LuthierError
) -> AsyncIterator[ObjectWriter]:
    """Yield a writer of an object, which is deleted when the block fails."""
    writer = ObjectWriter(storage, key, max_bytes=max_bytes, too_large=too_large)
    try:
        yield writer
    except BaseException:
        # Shielded: a disconnect cancels the request, and the bytes must be deleted all the same.
        await asyncio.shield(writer.abort())
        raise


@asynccontextmanager
async def receiving(
    request: Request,
    storage: Storage,
    key: str,
    *,
    max_bytes: int,
    max_body_bytes: int,
    too_large: LuthierError,
) -> AsyncIterator[tuple[ObjectWriter, AsyncIterator[bytes]]]:
    """Yield a writer of an object and the chunks of a request's body, to be parsed into it.

    Args:
        request: its body not yet read.
        max_bytes: of the object.
        max_body_bytes: of the body, by its Content-Length.
        too_large: raised beyond either.
    """
    # One iterator for parsing and discarding: a body can be iterated only once.
    chunks = request.stream()
    declared = request.headers.get("content-length", "")
    try:
        if declared.isdecimal() and int(declared) > max_body_bytes:
            raise too_large
        async with writing(storage, key, max_bytes=max_bytes, too_large=too_large) as writer:
            yield writer, chunks
    except LuthierError:
        await discard_rest(chunks)
        raise


async def discard_rest(chunks: AsyncIterator[bytes]) -> None:
    """Read the rest of a body for a few seconds, so that the client reads its answer."""
    with suppress(ClientDisconnect, TimeoutError):
        async with asyncio.timeout(_DISCARD_SECONDS):
            async for _ in chunks:
                pass
