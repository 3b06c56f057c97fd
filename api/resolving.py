"""What runs for a request: those that come while others are looked up are looked up together, after them.

A look into the database costs a thread's turn, a connection and two statements, which take many times as long
as what one more request in them does. Requests that come one by one wait for nobody.
"""

import asyncio

from starlette.concurrency import run_in_threadpool

from db.session import Database
from luthier.bases.catalogue import Catalogue
from luthier.core.errors import LuthierError
from luthier.core.inference import ModelTarget
from services.targets import Call, find_targets

# So that those who come next don't wait for too many.
MAX_TOGETHER = 64
_GATHER_SECONDS = 0.001
# Turns of the event loop that a request takes from its connection to here.
_QUIET_TURNS = 6


class Resolver:
    """Looks keys and names up, each once, after its request has come.

    Args:
        database: where they are.
        catalogue: the bases there are.
    """

    def __init__(self, database: Database, catalogue: Catalogue) -> None:
        self._database = database
        self._catalogue = catalogue
        self._waiting: list[tuple[Call, asyncio.Future[ModelTarget]]] = []
        self._task: asyncio.Task[None] | None = None

    async def resolve(self, call: Call) -> ModelTarget:
        """Return what the inference server runs for a request.

        Args:
            call: its key and the name that it asks for.

        Returns:
            The target, under the name that was asked for.

        Raises:
            UnauthenticatedError: when the key is malformed, unknown or revoked.
            LuthierError: what is wrong with the name, once the key is good.
            ModelNotFoundError: when the key's project has no such model.
            UnavailableError: when the database can't be reached.
        """
        found: asyncio.Future[ModelTarget] = asyncio.get_running_loop().create_future()
        self._waiting.append((call, found))
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        return await found

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._gather()
                together, self._waiting = self._waiting[:MAX_TOGETHER], self._waiting[MAX_TOGETHER:]
                calls, futures = zip(*together, strict=True)
                for future, outcome in zip(futures, await self._look_up(calls), strict=True):
                    # A client may have left meanwhile.
                    if future.done():
                        continue
                    if isinstance(outcome, Exception):
                        future.set_exception(outcome)
                    else:
                        future.set_result(outcome)
        finally:
            self._task = None

    async def _gather(self) -> None:
        """Let requests come that have reached this machine already."""
        await asyncio.sleep(_GATHER_SECONDS)
        num_quiet, num_waiting = 0, len(self._waiting)
        while num_quiet < _QUIET_TURNS and len(self._waiting) < MAX_TOGETHER:
            await asyncio.sleep(0)
            num_quiet = num_quiet + 1 if len(self._waiting) == num_waiting else 0
            num_waiting = len(self._waiting)

    async def _look_up(self, calls: tuple[Call, ...]) -> list[ModelTarget | Exception]:
        def look_up() -> list[ModelTarget | LuthierError]:
            # Nothing here belongs together: names are resolved by one statement.
            with self._database.statements() as session:
                return find_targets(session, self._catalogue, calls)

        try:
            return [*await run_in_threadpool(look_up)]
        except Exception as error:  # noqa: BLE001 - each of the requests fails with it
            return [error] * len(calls)
