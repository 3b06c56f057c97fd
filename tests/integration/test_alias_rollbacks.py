"""The way back and forth: an alias is pointed only to what could be loaded, and by the newest request."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from itertools import cycle

import httpx2
import pytest
from sqlalchemy import select

from api.routes import aliases as alias_routes
from db.tables import Model
from luthier.core.inference import ModelTarget
from luthier.serving.base import Reply
from services.models import aliases
from tests.aliases import CHECKPOINT, DIGESTS, V1, V2, Aliases, scope_of
from tests.conftest import TINY_BASE, Api

Put = Callable[[Iterable[str]], None]


@pytest.fixture
def put_meanwhile(ours: Aliases, api: Api, monkeypatch: pytest.MonkeyPatch) -> Put:
    """Let another request point the alias while the server loads a model, once for each that is named."""
    answer, scope = api.backend.complete, scope_of(api)

    def prepare(models: Iterable[str]) -> None:
        left = iter(models)

        async def complete(path: str, body: bytes, target: ModelTarget) -> Reply:
            if (model := next(left, None)) is not None:
                with api.state.database.transaction() as session:
                    aliases.put(session, scope, api.state.catalogue, "prod", model)
            return await answer(path, body, target)

        monkeypatch.setattr(api.backend, "complete", complete)

    return prepare


def _models(ours: Aliases) -> list[str]:
    return [one["model"] for one in ours.ok("GET", "/aliases/prod/versions")["data"]]


def test_an_alias_goes_back_only_to_what_a_server_could_load(ours: Aliases, api: Api) -> None:
    ours.put("prod", V1)
    ours.put("prod", V2)
    api.backend.asked.clear()
    for body in (None, {"version": 1}):
        api.backend.status = 500
        api.backend.answer = b'{"error": {"code": "self_check_failed", "message": "Not finite."}}'
        status, code, param, message = ours.refused("POST", "/aliases/prod/rollback", body)
        assert (status, code, param) == (400, "model_not_available", "version")
        assert "Not finite" in message
    assert {target.digest for _, _, target in api.backend.asked} == {DIGESTS[V1]}
    assert ours.ok("GET", "/aliases/prod")["version"] == 2
    api.backend.status = 200
    assert ours.ok("POST", "/aliases/prod/rollback")["model"] == V1


def test_a_rollback_begins_anew_where_the_alias_was_pointed_elsewhere_meanwhile(
    ours: Aliases, put_meanwhile: Put
) -> None:
    ours.put("prod", V1)
    ours.put("prod", V2)
    put_meanwhile([CHECKPOINT])
    # What was before the checkpoint, not what was before what it replaced.
    assert ours.ok("POST", "/aliases/prod/rollback")["model"] == V2
    assert _models(ours) == [V2, CHECKPOINT, V2, V1]


def test_a_rollback_to_other_weights_is_refused_before_they_are_loaded(ours: Aliases, api: Api) -> None:
    ours.put("prod", V1)
    ours.put("prod", TINY_BASE)
    with api.state.database.transaction() as session:
        session.scalars(select(Model).where(Model.name == V1)).one().artifact_digest = "sha256:other"
    api.backend.asked.clear()
    refused = ours.refused("POST", "/aliases/prod/rollback")
    assert refused[:3] == (400, "model_not_available", "version")
    assert "has other weights since" in refused[3]
    assert not api.backend.asked


def test_a_rollback_whose_alias_is_pointed_elsewhere_every_time_gives_up(
    ours: Aliases, put_meanwhile: Put
) -> None:
    ours.put("prod", V1)
    ours.put("prod", V2)
    put_meanwhile(cycle((CHECKPOINT, V1, V2)))
    status, _, _, message = ours.refused("POST", "/aliases/prod/rollback", None)
    assert status == 503
    assert "again and again" in message
    # Where the last of the others left it.
    versions = _models(ours)
    assert versions[-2:] == [V2, V1]
    assert set(versions[:-2]) <= {CHECKPOINT, V1, V2}
    assert ours.ok("GET", "/aliases/prod")["model"] == versions[0]


def test_a_put_does_not_undo_what_was_asked_for_while_its_model_was_loaded(
    ours: Aliases, put_meanwhile: Put
) -> None:
    ours.put("prod", V1)
    put_meanwhile([CHECKPOINT])
    status, code, param, message = ours.refused("PUT", "/aliases/prod", {"model": V2})
    # 409 and 503 would be sent again by clients themselves.
    assert (status, code, param) == (400, "invalid_value", "name")
    assert "changed by somebody else" in message
    assert ours.ok("GET", "/aliases/prod")["model"] == CHECKPOINT
    # Where both want the same there is nothing to undo.
    put_meanwhile([V2])
    assert ours.put("prod", V2)["version"] == 3


def test_a_server_that_is_silent_holds_an_alias_up_for_a_while_and_no_longer(
    ours: Aliases, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours.put("prod", V1)

    async def say_nothing(path: str, body: bytes, target: ModelTarget) -> Reply:
        await asyncio.sleep(60)
        raise AssertionError("nobody waits so long")

    monkeypatch.setattr(api.backend, "complete", say_nothing)
    monkeypatch.setattr(alias_routes, "_SECONDS", 0.05)
    pointed = ours.put("prod", V2)
    assert (pointed["model"], pointed["proved"]) == (V2, False)


def test_a_client_that_has_left_changes_nothing(
    ours: Aliases, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours.put("prod", V1)
    answer, has_left, answered = api.backend.complete, threading.Event(), threading.Event()

    async def take_time(path: str, body: bytes, target: ModelTarget) -> Reply:
        await asyncio.to_thread(has_left.wait, 30)
        reply = await answer(path, body, target)
        answered.set()
        return reply

    monkeypatch.setattr(api.backend, "complete", take_time)
    with pytest.raises(httpx2.ReadTimeout):
        ours.ask("PUT", "/aliases/prod", {"model": V2}, timeout=0.3)
    has_left.set()
    assert answered.wait(30)
    monkeypatch.undo()
    for _ in range(20):
        assert _models(ours) == [V1]
        time.sleep(0.02)
