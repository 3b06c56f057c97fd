"""Which adapters one vLLM server holds: loaded when first wanted, unloaded when unused for longest.

vLLM never unloads an adapter by itself, so the budget is kept here. Other API processes may load and
unload at the same server: what they loaded counts, and what they unloaded is loaded again.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

Release = Callable[[], None]

# A copy that is used for longer is marked again, so that it does not look unused.
_RENEW_SECONDS = 3600.0


class Server(Protocol):
    """What this asks of vLLM."""

    async def list_adapters(self) -> list[str]:
        """Return the names of the adapters that it holds, ours alone."""

    async def unload(self, name: str) -> None:
        """Have it forget an adapter; harmless when it does not hold it."""


@dataclass(eq=False)
class _Entry:
    """An adapter that is loaded, or on its way."""

    loading: "asyncio.Task[None]"
    loaded_at: float
    num_holders: int = 0
    is_pinned: bool = False

    @property
    def is_idle(self) -> bool:
        """Whether it may leave."""
        return self.num_holders == 0 and self.loading.done() and not self.is_pinned

    def release(self) -> None:
        """Say that a request needs it no longer."""
        self.num_holders -= 1


class Adapters:
    """The adapters of one server.

    Args:
        max_loaded: adapters that may be loaded; more only while all of them answer.
        now: a monotonic clock, in seconds.
    """

    def __init__(self, server: Server, *, max_loaded: int, now: Callable[[], float] = time.monotonic) -> None:
        self._server = server
        self._max_loaded = max_loaded
        self._now = now
        # The one unused for longest first.
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._turn = asyncio.Lock()

    async def hold(
        self, name: str, load: Callable[[], Awaitable[None]], *, is_pinned: bool = False
    ) -> Release:
        """Make sure that an adapter is loaded, where it stays until it is released.

        Args:
            load: loads it; may be called when it is loaded already.
            is_pinned: whether it stays while idle.
        """
        entry = self._entries.get(name)
        if entry is None or self._now() - entry.loaded_at > _RENEW_SECONDS:
            entry = self._enter(name, load)
        self._entries.move_to_end(name)
        entry.num_holders += 1
        entry.is_pinned = is_pinned
        try:
            await asyncio.shield(entry.loading)
        except BaseException:
            entry.release()
            raise
        return entry.release

    def forget(self, name: str) -> None:
        """Note that the server does not hold an adapter, whatever it held before."""
        self._entries.pop(name, None)

    async def aclose(self) -> None:
        """Stop what is being loaded."""
        for entry in self._entries.values():
            entry.loading.cancel()

    def _enter(self, name: str, load: Callable[[], Awaitable[None]]) -> _Entry:
        loading = asyncio.ensure_future(self._load(name, load))
        entry = self._entries[name] = _Entry(loading, self._now())

        def on_loaded(_loading: "asyncio.Task[None]") -> None:
            has_failed = loading.cancelled() or loading.exception() is not None
            if has_failed and self._entries.get(name) is entry:
                self.forget(name)

        loading.add_done_callback(on_loaded)
        return entry

    async def _load(self, name: str, load: Callable[[], Awaitable[None]]) -> None:
        async with self._turn:
            await self._make_room(name)
            await load()

    async def _make_room(self, name: str) -> None:
        loaded = set(await self._server.list_adapters()) - {name}
        while len(loaded) >= self._max_loaded:
            idle = [one for one, entry in self._entries.items() if one in loaded and entry.is_idle]
            # Then what other API processes loaded, whose use is unknown here.
            idle += sorted(loaded - self._entries.keys())
            if not idle:
                return
            self.forget(idle[0])
            loaded.discard(idle[0])
            await self._server.unload(idle[0])
