"""Which of several servers a request goes to, over servers that are played."""

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

import pytest

from luthier.core.errors import ArtifactCorruptError, LuthierError, TooManyRequestsError, UnavailableError
from luthier.core.inference import ModelTarget
from luthier.serving.base import Health, NotAcceptedError, Reply
from luthier.serving.router import ReplicaRouter

pytestmark = pytest.mark.anyio
BARE = ModelTarget(model="b", base_id="base", project_id="p")


def tuned(name: str) -> ModelTarget:
    return ModelTarget(model=name, base_id="base", project_id="p", artifact=name, digest=f"sha256:{name}")


@dataclass
class PlayedServer:
    """A server that is what a test makes of it."""

    holds: set[str] = field(default_factory=set)
    running: int = 0
    waiting: int = 0
    is_ready: bool = True
    is_down: bool = False
    refuses_with: LuthierError | None = None
    serves: frozenset[str] | None = None
    asked: list[str] = field(default_factory=list)
    num_looks: int = 0
    answers: asyncio.Event | None = None

    async def complete(self, path: str, body: bytes, target: ModelTarget) -> Reply:
        if self.is_down:
            raise NotAcceptedError("down")
        self.asked.append(target.model)
        refusal = self.refuses_with
        if refusal is not None:
            return Reply(refusal.http_status, {}, json.dumps(refusal.to_body()).encode())

        async def events() -> AsyncGenerator[bytes]:
            yield b"a"
            yield b"b"

        return Reply(200, {}, events=events())

    async def health(self) -> Health:
        self.num_looks += 1
        if self.answers is not None:
            await self.answers.wait()
        if self.is_down:
            raise UnavailableError("down")
        return Health(self.is_ready, frozenset(self.holds), self.running, self.waiting, self.serves)

    async def aclose(self) -> None:
        pass


class Stage:
    """Servers under one client, with a clock that a test moves."""

    def __init__(self, *servers: PlayedServer) -> None:
        self.servers = servers
        self.time = 100.0
        self.client = ReplicaRouter(
            {f"http://{number}": server for number, server in enumerate(servers)}, now=lambda: self.time
        )

    async def ask(self, target: ModelTarget) -> int:
        """Return which server answered a request that is read to its end."""
        counts = [len(server.asked) for server in self.servers]
        reply = await self.client.complete("/v1/completions", b"{}", target)
        assert reply.status == 200
        assert b"".join([piece async for piece in reply.events]) == b"ab"
        await reply.aclose()
        changed = [len(server.asked) > count for server, count in zip(self.servers, counts, strict=True)]
        assert sum(changed) == 1
        return changed.index(True)

    async def later(self, seconds: float) -> None:
        """Move the clock, and have every server looked at that is due."""
        self.time += seconds
        await self.client._look()
        for _ in range(5):
            await asyncio.sleep(0)


HELD = {"sha256:m"}
BASE, OTHER = frozenset({"base"}), frozenset({"other"})


@pytest.mark.parametrize(
    ("servers", "expected"),
    [
        # The one that holds the model, the least loaded of those that hold it, one that can answer for it.
        ([{}, {"holds": HELD, "running": 9, "waiting": 9}, {}], 1),
        ([{"holds": HELD, "running": 3}, {"holds": HELD, "running": 1}, {}], 1),
        ([{"serves": BASE, "running": 4}, {"serves": OTHER}], 0),
    ],
)
async def test_a_model_goes_to_the_nearest_server_that_can_answer(servers, expected):
    stage = Stage(*(PlayedServer(**one) for one in servers))
    assert [await stage.ask(tuned("m")) for _ in range(3)] == [expected] * 3


async def test_the_bare_base_goes_to_a_server_that_serves_it_and_health_names_all_bases():
    stage = Stage(PlayedServer(serves=BASE, running=4), PlayedServer(serves=OTHER))
    assert await stage.ask(BARE) == 0
    assert (await stage.client.health()).serves == {"base", "other"}


async def test_new_models_go_where_every_api_process_sends_them():
    names = [f"m{number}" for number in range(60)]
    stages = [Stage(*(PlayedServer() for _ in range(3))) for _ in range(2)]
    chosen = [[await stage.ask(tuned(name)) for name in names] for stage in stages]
    assert chosen[0] == chosen[1]
    assert all(chosen[0].count(server) >= 10 for server in range(3))


async def test_a_new_model_passes_over_a_server_where_requests_wait_and_stays_where_it_was_sent():
    stage = Stage(PlayedServer(), PlayedServer())
    first = await stage.ask(tuned("m"))
    stage = Stage(*(PlayedServer(waiting=int(number == first)) for number in range(2)))
    other = await stage.ask(tuned("m"))
    assert other == 1 - first
    stage.servers[first].waiting, stage.servers[other].waiting = 0, 1
    await stage.later(2)
    # The other one is loading it, though it does not report it yet.
    assert await stage.ask(tuned("m")) == other


async def test_the_bare_base_goes_to_the_least_loaded_with_open_requests_counted():
    stage = Stage(PlayedServer(running=1), PlayedServer(running=0))
    first = await stage.client.complete("/v1/completions", b"{}", BARE)
    second = await stage.client.complete("/v1/completions", b"{}", BARE)
    third = await stage.client.complete("/v1/completions", b"{}", BARE)
    assert sorted(len(server.asked) for server in stage.servers) == [1, 2]
    for reply in (first, second, third):
        await reply.aclose()
        await reply.aclose()
    assert await stage.ask(BARE) == 1


async def test_a_dead_one_is_passed_over_and_the_next_gets_its_requests():
    stage = Stage(PlayedServer(holds={"sha256:m"}), PlayedServer())
    assert await stage.ask(tuned("m")) == 0
    stage.servers[0].is_down = True
    assert await stage.ask(tuned("m")) == 1
    looks = stage.servers[0].num_looks
    assert await stage.ask(tuned("m")) == 1
    assert stage.servers[0].num_looks == looks
    stage.servers[0].is_down = False
    await stage.later(15)
    assert await stage.ask(tuned("m")) == 0


async def test_a_dead_one_is_looked_at_ever_more_rarely():
    stage = Stage(PlayedServer(is_down=True), PlayedServer())
    for _ in range(240):
        await stage.later(0.5)
    # 0.5 s, 1, 2, 4, 8 and then every 10 s: some 16 in two minutes.
    assert 12 <= stage.servers[0].num_looks <= 20


async def test_one_that_does_not_answer_holds_up_the_first_request_for_a_second_and_no_other():
    stage = Stage(PlayedServer(answers=asyncio.Event()), PlayedServer())
    assert await stage.ask(BARE) in {0, 1}
    async with asyncio.timeout(10):
        while not stage.client._servers[0].is_down:
            await asyncio.sleep(0.05)
    loop = asyncio.get_running_loop()
    begun = loop.time()
    assert [await stage.ask(BARE) for _ in range(20)] == [1] * 20
    assert loop.time() - begun < 0.5


async def test_servers_are_not_asked_for_every_request():
    stage = Stage(PlayedServer(), PlayedServer())
    for _ in range(10):
        await stage.ask(BARE)
    assert [server.num_looks for server in stage.servers] == [1, 1]
    await stage.later(1.5)
    assert [server.num_looks for server in stage.servers] == [2, 2]


async def test_a_refusal_for_want_of_room_is_asked_elsewhere_and_another_is_not():
    full = PlayedServer(holds={"sha256:m"}, refuses_with=TooManyRequestsError("full"))
    stage = Stage(full, PlayedServer())
    reply = await stage.client.complete("/v1/completions", b"{}", tuned("m"))
    assert reply.status == 200
    await reply.aclose()
    for error in (TooManyRequestsError("full"), ArtifactCorruptError("damaged")):
        servers = (PlayedServer(refuses_with=error), PlayedServer(refuses_with=error))
        stage = Stage(*servers)
        reply = await stage.client.complete("/v1/completions", b"{}", tuned("m"))
        assert reply.status == error.http_status
        assert json.loads(reply.content) == error.to_body()
        is_damaged = isinstance(error, ArtifactCorruptError)
        assert sum(len(server.asked) for server in servers) == (1 if is_damaged else 2)


async def test_without_any_server_the_error_is_clear():
    stage = Stage(PlayedServer(is_down=True), PlayedServer(is_down=True))
    for _ in range(2):
        with pytest.raises(UnavailableError, match="None of the 2 model servers"):
            await stage.ask(BARE)
    with pytest.raises(UnavailableError):
        await stage.client.health()
    # The first that comes back is found, however long it was away.
    stage.servers[1].is_down = False
    assert await stage.ask(BARE) == 1


async def test_one_ready_server_makes_all_ready_and_gets_the_requests():
    stage = Stage(
        PlayedServer(is_ready=False), PlayedServer(running=5, holds={"x"}), PlayedServer(is_down=True)
    )
    assert await stage.ask(BARE) == 1
    health = await stage.client.health()
    assert health.is_ready
    assert (health.num_running, health.holds, health.serves) == (5, {"x"}, None)
