"""Bodies of answers that are passed on: read already, or to be told of at their end."""

from collections.abc import Callable

from luthier.inference.backends.base import Body


class ReadBody:
    """A body that is in memory.

    Args:
        content: all of it.
    """

    def __init__(self, content: bytes) -> None:
        self._content = content

    def __aiter__(self) -> "ReadBody":
        return self

    async def __anext__(self) -> bytes:
        content, self._content = self._content, b""
        if not content:
            raise StopAsyncIteration
        return content

    async def aclose(self) -> None:
        """Drop it."""
        self._content = b""


class EndingBody:
    """A body whose end somebody is told of, once, however it ends.

    Args:
        on_end: called at the end, when reading fails, and when nobody reads on.
    """

    def __init__(self, body: Body, on_end: Callable[[], None]) -> None:
        self._body = body
        self._on_end: Callable[[], None] | None = on_end

    def __aiter__(self) -> "EndingBody":
        return self

    async def __anext__(self) -> bytes:
        try:
            return await anext(self._body)
        except BaseException:
            self._end()
            raise

    async def aclose(self) -> None:
        """Stop reading."""
        self._end()
        await self._body.aclose()

    def _end(self) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end()
