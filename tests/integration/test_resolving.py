"""Requests that are looked up together, in real PostgreSQL: each is told its own, whoever the others are."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from sqlalchemy import text

from api.resolving import Resolver
from db.session import Database
from luthier.core.errors import (
    InvalidRequestError,
    InvalidValueError,
    MissingParameterError,
    ModelNotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from luthier.core.inference import ModelTarget
from luthier.core.keys import new_api_key
from services.targets import Call, find_targets
from tests.aliases import CHECKPOINT, DIGESTS, V1, V2, Aliases, make_ours
from tests.conftest import TINY_BASE, Api
from tests.statements import counted


@pytest.fixture
def ours(api: Api) -> Aliases:
    return make_ours(api)


def _resolve(resolver: Resolver, calls: Sequence[Call]) -> list[ModelTarget | BaseException]:
    async def resolve() -> list[ModelTarget | BaseException]:
        return await asyncio.gather(*map(resolver.resolve, calls), return_exceptions=True)

    return asyncio.run(resolve())


def test_each_of_many_is_told_its_own(api: Api, ours: Aliases) -> None:
    ours.put("prod", V1)
    theirs = ours.ok("POST", "/keys", {"name": "other", "project": "other"})["key"]
    fault = MissingParameterError("Missing.", param="model")
    calls = [
        Call(api.key, V1),
        Call(theirs, V1),
        Call(new_api_key(), V1),
        Call(api.key, "prod"),
        Call(theirs, "prod"),
        Call("no key", fault),
        Call(api.key, fault),
        Call(api.key, "a\x00b"),
        Call(theirs, "\ud800"),
        Call(theirs, TINY_BASE),
        Call(api.key, V2),
        Call(api.key, V1),
    ]
    with counted(api.parts.database) as statements:
        found = _resolve(api.parts.resolver, calls)
    # However many, with the one that notes when a key was last used.
    assert sum(statement.startswith("SELECT") for statement in statements) == 2, statements
    kinds = [type(one) for one in found]
    assert kinds == [
        ModelTarget,
        ModelNotFoundError,
        UnauthenticatedError,
        ModelTarget,
        ModelNotFoundError,
        UnauthenticatedError,
        MissingParameterError,
        InvalidValueError,
        InvalidValueError,
        ModelTarget,
        ModelTarget,
        ModelTarget,
    ]
    told = {(one.model, one.digest) for one in found if isinstance(one, ModelTarget)}
    assert told == {(V1, DIGESTS[V1]), ("prod", DIGESTS[V1]), (TINY_BASE, None), (V2, DIGESTS[V2])}
    ours_id, theirs_id = found[0], found[9]
    assert isinstance(ours_id, ModelTarget)
    assert isinstance(theirs_id, ModelTarget)
    assert ours_id.project_id != theirs_id.project_id


def test_more_than_go_together_are_looked_up_after_each_other(
    api: Api, ours: Aliases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.resolving.MAX_TOGETHER", 4)
    ours.put("prod", V2)
    names = [V1, "prod", TINY_BASE] * 3
    with counted(api.parts.database) as statements:
        found = _resolve(api.parts.resolver, [Call(api.key, name) for name in names])
    assert [one.model for one in found if isinstance(one, ModelTarget)] == names
    assert len(statements) == 2 * 3


def test_who_comes_some_turns_later_goes_with_the_first(api: Api, ours: Aliases) -> None:
    async def check() -> None:
        resolve = api.parts.resolver.resolve
        first = asyncio.create_task(resolve(Call(api.key, V1)))
        for _ in range(4):
            await asyncio.sleep(0)
        assert (await resolve(Call(api.key, V2))).digest == DIGESTS[V2]
        assert (await first).digest == DIGESTS[V1]

    with counted(api.parts.database) as statements:
        asyncio.run(check())
    assert len(statements) == 2, statements


def test_requests_that_keep_coming_are_not_waited_for_for_long(
    api: Api, ours: Aliases, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check() -> None:
        resolve = api.parts.resolver.resolve
        coming = [asyncio.create_task(resolve(Call(api.key, V1)))]
        while not coming[0].done():
            await asyncio.sleep(0)
            coming.append(asyncio.create_task(resolve(Call(api.key, V1))))
        await asyncio.gather(*coming)
        assert len(coming) < 10**6

    monkeypatch.setattr("api.resolving.MAX_TOGETHER", 10**6)
    asyncio.run(check())


class _Held:
    """`find_targets`, which tells when it has read, and then waits until it may go on; the first, or all."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, are_all: bool = False) -> None:
        self.has_read, self.may_go_on = threading.Event(), threading.Event()
        self._find, self._are_all = find_targets, are_all
        monkeypatch.setattr("api.resolving.find_targets", self)

    def __call__(self, *given: Any) -> Any:
        found = self._find(*given)
        if self._are_all or not self.has_read.is_set():
            self.has_read.set()
            assert self.may_go_on.wait(30)
        return found


def test_who_comes_while_another_is_looked_up_sees_what_was_changed_before(
    api: Api, ours: Aliases, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours.put("prod", V1)
    held = _Held(monkeypatch)

    async def check() -> None:
        resolve = api.parts.resolver.resolve
        before = asyncio.create_task(resolve(Call(api.key, "prod")))
        await asyncio.to_thread(held.has_read.wait, 30)
        await asyncio.to_thread(ours.put, "prod", V2)
        after = asyncio.create_task(resolve(Call(api.key, "prod")))
        await asyncio.sleep(0)
        held.may_go_on.set()
        assert ((await before).digest, (await after).digest) == (DIGESTS[V1], DIGESTS[V2])

    asyncio.run(check())


def test_a_look_that_hangs_holds_up_its_own_requests_and_these_are_told(
    api: Api, ours: Aliases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.resolving._PATIENCE_SECONDS", 0.5)
    held = _Held(monkeypatch)

    async def check() -> None:
        resolve = api.parts.resolver.resolve
        stuck = asyncio.create_task(resolve(Call(api.key, V1)))
        await asyncio.to_thread(held.has_read.wait, 30)
        for _ in range(3):
            assert (await resolve(Call(api.key, V2))).digest == DIGESTS[V2]
        with pytest.raises(UnavailableError, match="in time"):
            await stuck
        held.may_go_on.set()
        assert (await resolve(Call(api.key, V1))).digest == DIGESTS[V1]

    asyncio.run(check())


def test_when_all_looks_hang_the_rest_is_told_in_time_and_goes_on_after(
    api: Api, ours: Aliases, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.resolving._PATIENCE_SECONDS", 0.5)
    monkeypatch.setattr("api.resolving._OVERDUE_SECONDS", 0.01)
    monkeypatch.setattr("api.resolving._MAX_LOOKS", 2)
    held = _Held(monkeypatch, are_all=True)

    async def check() -> None:
        resolve = api.parts.resolver.resolve
        stuck = []
        for _ in range(4):
            stuck.append(asyncio.create_task(resolve(Call(api.key, V1))))
            await asyncio.sleep(0.05)
        assert [type(one) for one in await asyncio.gather(*stuck, return_exceptions=True)] == [
            UnavailableError
        ] * 4
        held.may_go_on.set()
        assert (await resolve(Call(api.key, V1))).digest == DIGESTS[V1]

    asyncio.run(check())


def test_what_fails_on_one_request_fails_no_other(
    api: Api, ours: Aliases, monkeypatch: pytest.MonkeyPatch
) -> None:
    def find(session: Any, catalogue: Any, calls: Sequence[Call]) -> Any:
        if any(call.name == V2 for call in calls):
            raise RuntimeError("odd")
        return find_targets(session, catalogue, calls)

    monkeypatch.setattr("api.resolving.find_targets", find)
    found = _resolve(api.parts.resolver, [Call(api.key, name) for name in (V1, V2, TINY_BASE)])
    assert [type(one) for one in found] == [ModelTarget, RuntimeError, ModelTarget]


def test_what_is_shared_with_one_project_is_shared_with_no_other_of_those_who_ask_with_it(
    api: Api, ours: Aliases
) -> None:
    granted, other = (ours.ok("POST", "/keys", {"name": name, "project": name}) for name in ("a", "b"))
    path = f"/fine_tuning/checkpoints/{quote(CHECKPOINT, safe='')}/permissions"
    ours.ok("POST", path, {"project_ids": [granted["project_id"]]})
    keys = [other["key"], granted["key"], other["key"], api.key]
    found = _resolve(api.parts.resolver, [Call(key, CHECKPOINT) for key in keys])
    assert [type(one) for one in found] == [ModelNotFoundError, ModelTarget, ModelNotFoundError, ModelTarget]


def test_a_name_longer_than_any_is_nobodys(api: Api, ours: Aliases) -> None:
    names = ["x" * 10**6, "\ud800" * 2000, V1]
    found = _resolve(api.parts.resolver, [Call(api.key, name) for name in names])
    assert [type(one) for one in found] == [ModelNotFoundError, InvalidValueError, ModelTarget]


@pytest.mark.parametrize("is_known", [False, True])
def test_a_long_body_is_read_for_known_keys_alone(
    api: Api, is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []

    def name_of(body: bytes) -> InvalidRequestError:
        read.append(len(body))
        return InvalidRequestError("It was read.")

    monkeypatch.setattr("api.routes.chat._model_name", name_of)
    headers = api.headers if is_known else {"Authorization": f"Bearer {new_api_key()}"}
    answer = httpx2.post(f"{api.base_url}/v1/completions", headers=headers, content=b"[" * 20_000)
    assert (answer.status_code, read) == ((400, [20_000]) if is_known else (401, []))


def test_a_client_that_leaves_while_it_is_looked_up_holds_up_nobody(api: Api, ours: Aliases) -> None:
    async def check() -> None:
        resolve = api.parts.resolver.resolve
        gone, stays = (asyncio.create_task(resolve(Call(api.key, V1))) for _ in range(2))
        await asyncio.sleep(0)
        gone.cancel()
        assert (await stays).digest == DIGESTS[V1]
        assert (await resolve(Call(api.key, V1))).digest == DIGESTS[V1]

    asyncio.run(check())


def test_a_database_that_is_gone_is_told_to_each_and_is_used_again(
    api: Api, ours: Aliases, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = Database("postgresql://nobody@127.0.0.1:9/none", pool_size=1)
    resolver = Resolver(nowhere, api.parts.catalogue)
    found = _resolve(resolver, [Call(api.key, V1)] * 3)
    assert [type(one) for one in found] == [UnavailableError] * 3
    nowhere.close()
    monkeypatch.setattr(resolver, "_database", api.parts.database)
    (target,) = _resolve(resolver, [Call(api.key, V1)])
    assert isinstance(target, ModelTarget)


def test_a_key_that_is_revoked_opens_nothing_from_the_next_request_on(api: Api, ours: Aliases) -> None:
    made = ours.ok("POST", "/keys", {"name": "short-lived"})
    call = Call(made["key"], V1)
    assert isinstance(_resolve(api.parts.resolver, [call])[0], ModelTarget)
    with api.parts.database.transaction() as session:
        used = session.scalar(text("SELECT last_used_at FROM api_keys WHERE id = :id"), {"id": made["id"]})
    assert used is not None
    ours.ok("DELETE", f"/keys/{made['id']}")
    (refused,) = _resolve(api.parts.resolver, [call])
    assert isinstance(refused, UnauthenticatedError)


def test_a_url_without_v1_is_told_where_a_base_url_ends(api: Api) -> None:
    for path, is_told in (("/chat/completions", True), ("/v1/chat/completion", False)):
        error = httpx2.post(f"{api.base_url}{path}", headers=api.headers, json={}).json()["error"]
        assert error["code"] == "unknown_url"
        assert error["message"].endswith("A client's base URL ends in /v1.") is is_told
