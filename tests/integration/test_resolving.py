"""Requests that are looked up together, in real PostgreSQL: each is told its own, whoever the others are."""

import asyncio
from collections.abc import Sequence

import pytest
from sqlalchemy import text

from api.resolving import Resolver
from db.session import Database
from luthier.core.errors import (
    InvalidValueError,
    MissingParameterError,
    ModelNotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from luthier.core.inference import ModelTarget
from luthier.core.keys import new_api_key
from services.targets import Call
from tests.aliases import DIGESTS, V1, V2, Aliases, make_ours
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


def test_what_is_changed_before_a_request_is_seen_by_it_also_beside_a_look_up(
    api: Api, ours: Aliases
) -> None:
    ours.put("prod", V1)

    async def check() -> None:
        for model in (V2, V1, V2, V1):
            # One that is under way, and one that comes after the change.
            before = asyncio.create_task(api.parts.resolver.resolve(Call(api.key, "prod")))
            await asyncio.to_thread(ours.put, "prod", model)
            assert (await api.parts.resolver.resolve(Call(api.key, "prod"))).digest == DIGESTS[model]
            assert (await before).digest in (DIGESTS[V1], DIGESTS[V2])

    asyncio.run(check())


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
