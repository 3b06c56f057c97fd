"""Several servers behind one client: each request goes to one that holds its model, as far as one lives.

What each server holds is asked about once a second while requests come, beside them; a server that fails is
passed over for a while. API processes agree on where new models go without talking to each other: by
rendezvous hashing (Thaler and Ravishankar, 1998, "Using name-based mappings to increase hit rates").
"""

import asyncio
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack

from luthier.core.errors import LuthierError, OutOfMemoryError, TooManyRequestsError, UnavailableError
from luthier.core.inference import ModelTarget
from luthier.serving.base import Backend, Health, NotAcceptedError, Reply

# How old a server's word may be before it is asked again, and before a request waits for the answer.
_FRESH_SECONDS = 1.0
_TRUSTED_SECONDS = 10.0
_WAIT_SECONDS = 1.0
_HEALTH_SECONDS = 2.0
# A server that was sent a model loads it, which its state may not show yet.
_SENT_SECONDS = 30.0
_FIRST_DELAY_SECONDS = 0.5
_LONGEST_DELAY_SECONDS = 10.0


class _Server:
    """One server, and what is known of it."""

    def __init__(self, name: str, backend: Backend) -> None:
        self.name = name
        self.backend = backend
        self.num_open = 0
        self.looking: asyncio.Task[None] | None = None
        self._health: Health | None = None
        self._known_at = 0.0
        self._num_open_then = 0
        self._num_failures = 0
        self._retry_at = 0.0
        self._sent: dict[str, float] = {}

    @property
    def is_down(self) -> bool:
        """Whether it failed when it was asked last."""
        return self._num_failures > 0

    @property
    def is_ready(self) -> bool:
        """Whether it said so, or nothing yet."""
        return self._health is None or self._health.is_ready

    @property
    def is_full(self) -> bool:
        """Whether requests wait there."""
        return self._health is not None and self._health.num_waiting > 0

    @property
    def load(self) -> int:
        """Sequences that run and wait there, with those sent since its last state."""
        known = 0 if self._health is None else self._health.num_running + self._health.num_waiting
        return known + self.num_open - self._num_open_then

    def serves(self, target: ModelTarget) -> bool:
        """Whether it can answer for a model; also where that is not known."""
        if self._health is None or self._health.serves is None:
            return True
        beneath = target.full_model_digest or target.base_id
        return not self._health.serves.isdisjoint({beneath, target.digest or beneath})

    def holds(self, name: str, now: float) -> bool:
        """Whether a model is in its memory, or on its way there."""
        is_held = self._health is not None and name in self._health.holds
        return is_held or now - self._sent.get(name, -_SENT_SECONDS) < _SENT_SECONDS

    def is_due(self, now: float) -> bool:
        """Whether it is to be asked how it is."""
        is_old = self._health is None or now - self._known_at >= _FRESH_SECONDS
        return self.looking is None and now >= self._retry_at and (self.is_down or is_old)

    def is_known(self, now: float) -> bool:
        """Whether a choice may rest on its last word."""
        return self.is_down or (self._health is not None and now - self._known_at < _TRUSTED_SECONDS)

    def send(self, name: str | None, now: float) -> None:
        """Note that a model was sent there."""
        if name is not None:
            self._sent = {sent: at for sent, at in self._sent.items() if now - at < _SENT_SECONDS}
            self._sent[name] = now

    def end(self) -> None:
        self.num_open -= 1

    def update(self, health: Health, now: float) -> None:
        self._health, self._known_at, self._num_open_then = health, now, self.num_open
        self._num_failures, self._retry_at = 0, 0.0

    def failed(self, now: float) -> None:
        """Note that it can't be reached."""
        delay = min(_FIRST_DELAY_SECONDS * 2**self._num_failures, _LONGEST_DELAY_SECONDS)
        self._num_failures = min(self._num_failures + 1, 16)
        self._retry_at = now + delay
        self._sent.clear()


class ReplicaRouter:
    """Choose a server for each request.

    Args:
        backends: the servers by URL; all API processes name them alike.
        now: a monotonic clock, in seconds.
    """

    def __init__(self, backends: Mapping[str, Backend], now: Callable[[], float] = time.monotonic) -> None:
        self._servers = [_Server(name, backend) for name, backend in backends.items()]
        self._now = now

    async def complete(self, path: str, body: bytes, target: ModelTarget) -> Reply:
        """Send a request to the best server; return its answer, of a stream once its headers have come.

        Raises:
            NotAcceptedError: when none of the servers can be reached.
            UnavailableError: when the one that was sent the request disconnected in the middle.
        """
        await self._look()
        refusal: Reply | None = None
        for server in self._in_order(target):
            if refusal is not None and server.is_down:
                break
            reply = await self._ask(server, path, body, target)
            if reply is None:
                continue
            if reply.status not in (TooManyRequestsError.http_status, UnavailableError.http_status):
                return reply
            refusal = reply
            if not _may_ask_another(reply):
                break
        if refusal is not None:
            return refusal
        raise NotAcceptedError(
            f"None of the {len(self._servers)} model servers can be reached right now; try again."
        )

    async def health(self) -> Health:
        asked = [server.backend.health() for server in self._servers]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        found = [answer for answer in answers if isinstance(answer, Health)]
        if not found:
            raise UnavailableError("None of the model servers can be reached right now; try again.")
        limited = [health.serves for health in found if health.serves is not None]
        return Health(
            is_ready=any(health.is_ready for health in found),
            holds=frozenset().union(*(health.holds for health in found)),
            num_running=sum(health.num_running for health in found),
            num_waiting=sum(health.num_waiting for health in found),
            serves=frozenset().union(*limited) if len(limited) == len(found) else None,
            # What fits into the smallest fits everywhere.
            room_bytes={
                kind: min(health.room_bytes.get(kind, room) for health in found)
                for health in found
                for kind, room in health.room_bytes.items()
            },
        )

    async def aclose(self) -> None:
        for server in self._servers:
            if server.looking is not None:
                server.looking.cancel()
            await server.backend.aclose()

    async def _ask(self, server: _Server, path: str, body: bytes, target: ModelTarget) -> Reply | None:
        """Return a server's answer, None when it never got the request."""
        server.send(target.digest, self._now())
        server.num_open += 1
        async with AsyncExitStack() as stack:
            stack.callback(server.end)
            try:
                reply = await server.backend.complete(path, body, target)
            except NotAcceptedError:
                server.failed(self._now())
                return None
            if reply.events is None:
                return reply
            stack.push_async_callback(reply.aclose)
            return reply._replace(aclose=stack.pop_all().aclose)

    def _in_order(self, target: ModelTarget) -> list[_Server]:
        """Return the servers, the best one for a model first, those that are down last."""
        now, name = self._now(), target.digest or target.base_id

        def rank(server: _Server) -> tuple[object, ...]:
            holds, is_bare = server.holds(name, now), target.digest is None
            # A model that no server holds goes by its hash alone, unless requests wait: API processes
            # whose knowledge differs by a moment would send it to several servers.
            is_full = server.is_full and not holds and not is_bare
            load = server.load if holds or is_bare else 0
            fitness = (server.is_down, not server.serves(target), not server.is_ready)
            return (*fitness, not (holds or is_bare), is_full, load, not holds, _weight(name, server.name))

        return sorted(self._servers, key=rank)

    async def _look(self) -> None:
        """Ask servers how they are, beside the request unless too little is known for a choice."""
        now = self._now()
        for server in self._servers:
            if server.is_due(now):
                server.looking = asyncio.create_task(self._look_at(server))
        unknown = [server for server in self._servers if not server.is_known(now)]
        waited_for = [server.looking for server in unknown if server.looking is not None]
        if waited_for:
            await asyncio.wait(waited_for, timeout=_WAIT_SECONDS)

    async def _look_at(self, server: _Server) -> None:
        try:
            async with asyncio.timeout(_HEALTH_SECONDS):
                health = await server.backend.health()
        except (LuthierError, TimeoutError):
            server.failed(self._now())
        else:
            server.update(health, self._now())
        finally:
            server.looking = None


def _weight(name: str, server: str) -> bytes:
    return hashlib.sha256(f"{name} {server}".encode()).digest()


def _may_ask_another(refusal: Reply) -> bool:
    """Return whether another server may be asked instead of the one that refused."""
    try:
        code = json.loads(refusal.content)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return False
    # Not a damaged artifact, which every server finds damaged.
    has_no_room = refusal.status == UnavailableError.http_status and code == OutOfMemoryError.code
    return has_no_room or code in (TooManyRequestsError.code, UnavailableError.code)
