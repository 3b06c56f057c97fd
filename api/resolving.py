"""What runs for a request: those that come while others are looked up are looked up together, after them.

A look into the database costs a thread's turn, a connection and two statements, which take many times as long
as what one more request in them does.
"""

import asyncio
import time

from starlette.concurrency import run_in_threadpool

from db.session import Database
from luthier.bases.catalogue import Catalogue
from luthier.core.errors import LuthierError, UnavailableError
from luthier.core.inference import ModelTarget
from services.targets import Call, find_targets

# So that those who come next don't wait for too many.
MAX_TOGETHER = 64
# How long the first one waits for others: in any case, and as long as they keep coming.
_GATHER_SECONDS, _LONGEST_GATHER_SECONDS = 0.001, 0.005
# Turns of the event loop that a request takes from its connection to here.
_QUIET_TURNS = 6
# After so long in the database the next ones don't wait for those before them any more, as long as there are
# no more than so many such looks: each has a thread and a connection.
_OVERDUE_SECONDS, _MAX_LOOKS = 0.1, 8
# A request is told that the database does not answer.
_PATIENCE_SECONDS = 3.0

_Waiting = tuple[Call, asyncio.Future[ModelTarget]]


class Resolver:
    """Looks keys and names up, each once, after its request has come.

    Args:
        database: where they are.
    """

    def __init__(self, database: Database, catalogue: Catalogue) -> None:
        self._database = database
        self._catalogue = catalogue
        self._waiting: list[_Waiting] = []
        self._task: asyncio.Task[None] | None = None
        self._looks: set[asyncio.Task[None]] = set()

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
            UnavailableError: when the database can't be reached, or does not answer in time.
        """
        found: asyncio.Future[ModelTarget] = asyncio.get_running_loop().create_future()
        self._waiting.append((call, found))
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        try:
            async with asyncio.timeout(_PATIENCE_SECONDS):
                return await found
        except TimeoutError as error:
            raise UnavailableError("The database does not answer in time; try again.") from error

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._gather()
                together, self._waiting = self._waiting[:MAX_TOGETHER], self._waiting[MAX_TOGETHER:]
                look = asyncio.create_task(self._look_up(together))
                self._looks.add(look)
                look.add_done_callback(self._looks.discard)
                await asyncio.wait({look}, timeout=_OVERDUE_SECONDS)
                while len(self._looks) >= _MAX_LOOKS:
                    await asyncio.wait(self._looks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._task = None

    async def _gather(self) -> None:
        """Let requests come that have reached this machine already."""
        latest = time.monotonic() + _LONGEST_GATHER_SECONDS
        await asyncio.sleep(_GATHER_SECONDS)
        num_quiet, num_waiting = 0, len(self._waiting)
        while num_quiet < _QUIET_TURNS and num_waiting < MAX_TOGETHER and time.monotonic() < latest:
            await asyncio.sleep(0)
            num_quiet = num_quiet + 1 if len(self._waiting) == num_waiting else 0
            num_waiting = len(self._waiting)

    async def _look_up(self, together: list[_Waiting]) -> None:
        def look_up() -> list[ModelTarget | LuthierError]:
            # Nothing here belongs together: names are resolved by one statement.
            with self._database.statements() as session:
                return find_targets(session, self._catalogue, [call for call, _ in together])

        found: list[ModelTarget | LuthierError]
        try:
            found = await run_in_threadpool(look_up)
        except UnavailableError as error:
            found = [error] * len(together)
        except Exception as error:  # noqa: BLE001 - whose request it is hears of it, and nobody else
            await self._look_up_apart(together, error)
            return
        for (_, future), outcome in zip(together, found, strict=True):
            # A client may have left meanwhile.
            if future.done():
                continue
            if isinstance(outcome, LuthierError):
                future.set_exception(outcome)
            else:
                future.set_result(outcome)

    async def _look_up_apart(self, together: list[_Waiting], error: Exception) -> None:
        if len(together) > 1:
            for one in together:
                await self._look_up([one])
        elif not together[0][1].done():
            together[0][1].set_exception(error)
