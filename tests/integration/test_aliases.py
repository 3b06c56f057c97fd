"""Aliases: names that are pointed to models while they answer, over HTTP and real PostgreSQL."""

from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import pytest
from sqlalchemy import select

from db.tables import Checkpoint, Model
from luthier.core.errors import ModelInUseError
from luthier.core.ids import new_id
from services.accounts.auth import Principal
from services.models import aliases, models, names
from tests.aliases import CHECKPOINT, DIGESTS, V1, V2, Aliases, scope_of
from tests.conftest import TINY_BASE, Api, wait_until
from tests.statements import counted, is_one_waiting


@pytest.fixture
def scope(api: Api, ours: Aliases) -> Principal:
    return scope_of(api)


def _asked(api: Api, ours: Aliases, name: str) -> tuple[str, str | None]:
    ours.ok("POST", "/chat/completions", {"model": name, "messages": [{"role": "user", "content": "hi"}]})
    target = api.backend.asked[-1][2]
    return target.model, target.digest


def test_an_alias_answers_under_its_name_with_what_it_points_to_and_goes_back(
    api: Api, ours: Aliases
) -> None:
    made = ours.put("prod", V1)
    assert (made["object"], made["name"], made["model"], made["version"]) == ("alias", "prod", V1, 1)
    assert (made["digest"], made["proved"]) == (DIGESTS[V1], True)
    assert _asked(api, ours, "prod") == ("prod", DIGESTS[V1])
    assert ours.put("prod", V1) == made
    assert ours.put("prod", V2)["version"] == 2
    assert _asked(api, ours, "prod") == ("prod", DIGESTS[V2])
    # A mapped name is its base.
    assert ours.put("prod", "gpt-4o-mini-2024-07-18")["model"] == TINY_BASE
    assert _asked(api, ours, "prod") == ("prod", None)

    # One rollback after another goes further back.
    for model, version in ((V2, 4), (V1, 5)):
        back = ours.ok("POST", "/aliases/prod/rollback")
        assert (back["model"], back["version"]) == (model, version)
        assert _asked(api, ours, "prod") == ("prod", DIGESTS[model])
    assert ours.refused("POST", "/aliases/prod/rollback")[:3] == (400, "invalid_value", "version")
    assert ours.ok("POST", "/aliases/prod/rollback", {"version": 1})["version"] == 5
    assert ours.ok("POST", "/aliases/prod/rollback", {"version": 3})["model"] == TINY_BASE

    history = ours.ok("GET", "/aliases/prod/versions?limit=4")
    reported = [(one["version"], one["model"], one["restored_version"]) for one in history["data"]]
    assert reported == [(6, TINY_BASE, 3), (5, V1, 1), (4, V2, 2), (3, TINY_BASE, None)]
    assert history["has_more"] is True
    rest = ours.ok("GET", f"/aliases/prod/versions?after={history['last_id']}")["data"]
    assert [(one["version"], one["digest"]) for one in rest] == [(2, "sha256:2"), (1, "sha256:1")]
    assert rest[0]["created_by_key_id"].startswith("key_")
    assert ours.ok("GET", "/aliases/prod")["version"] == 6

    assert ours.ok("DELETE", "/aliases/prod")["deleted"] is True
    assert ours.refused("GET", "/aliases/prod")[:3] == (404, "not_found", "name")
    assert ours.ask("POST", "/chat/completions", {"model": "prod"}).status_code == 404
    # The same name again is another alias.
    assert ours.put("prod", V2)["version"] == 1


def test_an_alias_may_have_a_mapped_name_which_then_answers_requests_and_starts_no_job(ours: Aliases) -> None:
    name, chat = "gpt-4o-mini-2024-07-18", {"messages": [{"role": "user", "content": "a"}]}
    answer = ours.ask("POST", "/chat/completions", {"model": name} | chat)
    assert answer.headers["x-luthier-model"] == TINY_BASE
    ours.put(name, V1)
    # Clients send what they always sent, and the answer says what answered.
    answer = ours.ask("POST", "/chat/completions", {"model": name} | chat)
    assert answer.headers["x-luthier-model"] == V1
    listed = [model for model in ours.ok("GET", "/models")["data"] if model["id"] == name]
    assert [model["alias_of"] for model in listed] == [V1]
    file_id = ours.ok("GET", "/files")["data"][0]["id"]
    job = ours.ok("POST", "/fine_tuning/jobs", {"model": name, "training_file": file_id})
    assert (job["model"], job["started_from"]) == (TINY_BASE, None)
    job = ours.ok("POST", "/fine_tuning/jobs", {"model": V1, "training_file": file_id})
    assert job["started_from"]["name"] == V1
    assert ours.ok("DELETE", f"/aliases/{name}")["deleted"] is True
    answer = ours.ask("POST", "/chat/completions", {"model": name} | chat)
    assert answer.headers["x-luthier-model"] == TINY_BASE


def test_names_and_targets_that_can_t_be_are_reported_by_field(ours: Aliases) -> None:
    taken = (TINY_BASE, V1, "FT:x")
    for name in (*taken, "-x", "a b", "ä", "a//b", "a/", "a/.", ":a", "x" * 129):
        refused = ours.refused("PUT", f"/aliases/{quote(name, safe='')}", {"model": V1})
        assert refused[:3] == (400, "invalid_value", "name"), name
    ours.put("prod", V1)
    for body, code, param in (
        ({"model": "prod"}, "invalid_value", "model"),
        ({"model": "nope"}, "model_not_available", "model"),
        ({"model": 1}, "invalid_type", "model"),
        ({}, "missing_required_parameter", "model"),
        ({"model": V1, "weight": 1}, "unknown_parameter", "weight"),
    ):
        assert ours.refused("PUT", "/aliases/beta", body)[:3] == (400, code, param)
    assert ours.refused("GET", "/aliases/beta")[0] == 404
    for version, code in ((9, "invalid_value"), (0, "invalid_value"), ("1", "invalid_type")):
        refused = ours.refused("POST", "/aliases/prod/rollback", {"version": version})
        assert refused[:3] == (400, code, "version")
    for method, path in (("POST", "/rollback"), ("GET", "/versions"), ("DELETE", "")):
        assert ours.refused(method, f"/aliases/no{path}")[:3] == (404, "not_found", "name")


def test_a_name_may_hold_slashes_and_colons(api: Api, ours: Aliases) -> None:
    for name in ("team/chat:v2", "a/versions", "Prod_1.x-y"):
        made = ours.put(name, V2)
        assert _asked(api, ours, name) == (name, DIGESTS[V2])
        escaped = quote(name, safe=":")
        assert ours.ok("GET", f"/aliases/{escaped}") | {"proved": True} == made
        assert len(ours.ok("GET", f"/aliases/{escaped}/versions")["data"]) == 1
        assert ours.ok("GET", f"/models/{escaped}")["alias_of"] == V2


def test_aliases_are_listed_in_pages_and_among_the_models(ours: Aliases) -> None:
    for name, model in (("one", V1), ("two", TINY_BASE), ("three", CHECKPOINT)):
        ours.put(name, model)
    page = ours.ok("GET", "/aliases?limit=2")
    assert ([one["name"] for one in page["data"]], page["has_more"]) == (["three", "two"], True)
    # A cursor that was deleted since still marks its place.
    ours.ok("DELETE", "/aliases/two")
    rest = ours.ok("GET", f"/aliases?limit=2&after={page['last_id']}")
    assert ([one["name"] for one in rest["data"]], rest["has_more"]) == (["one"], False)
    assert ours.refused("GET", "/aliases?after=alias_no")[:3] == (400, "invalid_value", "after")

    ours.put("two", TINY_BASE)
    listed = {model["id"]: model for model in ours.ok("GET", "/models")["data"]}
    assert listed["one"] == ours.ok("GET", "/models/one")
    shown = [listed["one"][member] for member in ("owned_by", "alias_of", "base_model", "digest")]
    assert shown == ["personal", V1, TINY_BASE, DIGESTS[V1]]
    assert (listed["two"]["alias_of"], listed["two"]["digest"]) == (TINY_BASE, listed[TINY_BASE]["digest"])
    assert "alias_of" not in listed[V1]
    # An alias may move between two files of a download.
    assert ours.refused("GET", "/models/one/files")[:3] == (400, "invalid_value", "model")
    assert ours.refused("DELETE", "/models/one")[:3] == (400, "invalid_value", "model")
    *refused, message = ours.refused("GET", f"/models/{TINY_BASE}/files")
    assert refused == [400, "invalid_value", "model"]
    assert "is a base model" in message


def test_what_an_alias_points_to_can_t_be_deleted_and_what_it_pointed_to_can(ours: Aliases) -> None:
    ours.put("prod", V1)
    ours.put("beta", V1)
    status, code, param, message = ours.refused("DELETE", f"/models/{V1}")
    assert (status, code, param) == (400, "model_in_use", "model")
    assert "beta, prod" in message
    for name in ("prod", "beta"):
        ours.put(name, V2)
    ours.ok("DELETE", f"/models/{V1}")
    for body in (None, {"version": 1}):
        status, code, param, message = ours.refused("POST", "/aliases/prod/rollback", body)
        assert (status, code, param) == (400, "model_not_available", "version")
        assert V1 in message
    assert ours.ok("GET", "/aliases/prod")["version"] == 2
    assert ours.ok("GET", "/aliases/prod/versions")["data"][-1]["model"] == V1
    ours.ok("DELETE", "/aliases/prod")
    ours.ok("DELETE", "/aliases/beta")
    ours.ok("DELETE", f"/models/{V2}")


def test_a_checkpoint_that_an_alias_points_to_makes_no_room_for_newer_ones(
    api: Api, ours: Aliases, scope: Principal
) -> None:
    ours.put("prod", CHECKPOINT)
    transaction = api.state.database.transaction
    with transaction() as session:
        for row in session.scalars(select(Model)).all():
            job_id, of_model = row.job_id, {"model_id": row.id, "step_number": 10 - row.step, "metrics": {}}
            session.add(
                Checkpoint(id=new_id("checkpoint"), **scope.owner_columns(), job_id=job_id, **of_model)
            )
    with transaction() as session:
        assert models.retire_checkpoints(session, job_id, keep=1, spared_step=None) == ["k1"]
    assert _asked(api, ours, "prod") == ("prod", DIGESTS[CHECKPOINT])
    ours.put("prod", V1)
    with transaction() as session:
        assert models.retire_checkpoints(session, job_id, keep=1, spared_step=None) == ["k2"]
    assert ours.refused("POST", "/aliases/prod/rollback")[1] == "model_not_available"


def test_a_job_that_names_an_alias_starts_from_what_it_points_to(ours: Aliases) -> None:
    file_id = ours.ok("GET", "/files")["data"][0]["id"]
    ours.put("prod", V1)
    job = ours.ok("POST", "/fine_tuning/jobs", {"model": "prod", "training_file": file_id})
    assert (job["model"], job["started_from"]) == (TINY_BASE, {"name": V1, "digest": DIGESTS[V1]})
    ours.put("prod", TINY_BASE)
    assert ours.ok("GET", f"/fine_tuning/jobs/{job['id']}")["started_from"]["name"] == V1
    job = ours.ok("POST", "/fine_tuning/jobs", {"model": "prod", "training_file": file_id})
    assert (job["model"], job["started_from"]) == (TINY_BASE, None)


def test_an_alias_is_its_projects_own_and_ends_with_what_it_may_call(
    api: Api, ours: Aliases, theirs: Aliases
) -> None:
    ours.put("prod", V1)
    for method, path in (
        ("GET", "/aliases/prod"),
        ("DELETE", "/aliases/prod"),
        ("GET", "/models/prod"),
        ("POST", "/aliases/prod/rollback"),
    ):
        assert theirs.refused(method, path)[0] == 404
    assert theirs.refused("PUT", "/aliases/prod", {"model": V2})[1] == "model_not_available"
    own_id = ours.ok("GET", "/keys")["data"][0]["project_id"]
    granted = ours.ok("POST", f"/fine_tuning/checkpoints/{V2}/permissions", {"project_ids": [own_id]})
    assert theirs.put("prod", V2)["model"] == V2
    assert _asked(api, theirs, "prod") == ("prod", DIGESTS[V2])
    assert _asked(api, ours, "prod") == ("prod", DIGESTS[V1])
    # A project that a model is shared with does not keep it from being deleted.
    permission = granted["data"][0]["id"]
    ours.ok("DELETE", f"/fine_tuning/checkpoints/{V2}/permissions/{permission}")
    refused = theirs.refused("POST", "/chat/completions", {"model": "prod", "messages": []})
    assert refused[:3] == (404, "model_not_found", "model")
    assert "alias" in refused[3]
    assert "prod" not in {model["id"] for model in theirs.ok("GET", "/models")["data"]}
    ours.ok("DELETE", f"/models/{V2}")


def test_every_name_is_resolved_by_one_statement(api: Api, ours: Aliases, scope: Principal) -> None:
    ours.put("prod", V1)
    ours.put("plain", TINY_BASE)
    state = api.state
    for name, digest in (("prod", DIGESTS[V1]), ("plain", None), (V2, DIGESTS[V2]), (TINY_BASE, None)):
        with state.database.transaction() as session, counted(state.database) as statements:
            target = names.resolve(session, scope, state.catalogue, name)
        assert (target.model, target.base_id, target.digest) == (name, TINY_BASE, digest)
        assert len(statements) == 1, statements


def test_a_request_sees_the_old_target_or_the_new_one_and_never_none(
    api: Api, ours: Aliases, scope: Principal
) -> None:
    ours.put("prod", V1)
    state = api.state

    def swap() -> None:
        # From a model to another, to a base, and back: each finds its target in other tables.
        for count in range(60):
            with state.database.transaction() as session:
                aliases.put(session, scope, state.catalogue, "prod", (V2, TINY_BASE, V1)[count % 3])

    seen: set[tuple[str | None, str | None]] = set()
    with ThreadPoolExecutor(1) as threads:
        swapped = threads.submit(swap)
        while not swapped.done():
            with state.database.transaction() as session:
                target = names.resolve(session, scope, state.catalogue, "prod")
            seen.add((target.artifact, target.digest))
        swapped.result()
    assert seen <= {("k0", "sha256:1"), ("k1", "sha256:2"), (None, None)}
    assert len(seen) > 1
    assert ours.ok("GET", "/aliases/prod")["version"] == 61


def test_of_a_put_and_the_deletion_of_its_target_at_the_same_time_one_is_refused(
    api: Api, ours: Aliases, scope: Principal
) -> None:
    state = api.state

    def delete() -> None:
        with state.database.transaction() as session:
            models.delete(session, scope, state.catalogue, V1)

    with ThreadPoolExecutor(1) as threads:
        with state.database.transaction() as session:
            aliases.put(session, scope, state.catalogue, "prod", V1)
            deleted = threads.submit(delete)
            wait_until(lambda: is_one_waiting(state.database), what="the deletion waits for the PUT")
        with pytest.raises(ModelInUseError, match="prod"):
            deleted.result(timeout=30)
    assert _asked(api, ours, "prod") == ("prod", DIGESTS[V1])


def test_an_alias_is_pointed_only_to_what_a_server_could_load(ours: Aliases, api: Api) -> None:
    ours.put("prod", V1)
    assert [target.digest for _, _, target in api.backend.asked] == [DIGESTS[V1]]
    api.backend.status = 500
    api.backend.answer = b'{"error": {"code": "self_check_failed", "message": "Its logits are not finite."}}'
    status, code, param, message = ours.refused("PUT", "/aliases/prod", {"model": V2})
    assert (status, code, param) == (400, "model_not_available", "model")
    assert "not finite" in message
    assert ours.ok("GET", "/aliases/prod")["model"] == V1
    # A server that is busy says nothing about the model, and the answer says that.
    api.backend.answer = b'{"error": {"code": "rate_limit_exceeded", "message": "Busy."}}'
    pointed = ours.put("prod", V2)
    assert (pointed["model"], pointed["proved"]) == (V2, False)
    assert ours.ok("POST", "/aliases/prod/rollback")["proved"] is False
    # A base has nothing to prove.
    assert ours.put("prod", TINY_BASE)["proved"] is None
    ours.put("prod", V1)
    back = ours.ok("POST", "/aliases/prod/rollback")
    assert (back["model"], back["proved"]) == (TINY_BASE, None)
