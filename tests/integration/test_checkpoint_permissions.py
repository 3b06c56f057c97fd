"""Sharing a model with another project: who may call it, and what else they may not do."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

import openai
import pytest
from sqlalchemy.orm import Session

from db.tables import Job
from luthier.core.errors import ModelNotFoundError
from luthier.core.specs import TrainingSpec
from services.accounts.auth import Principal
from services.models import models, permissions
from tests.aliases import add_model
from tests.conftest import Api, ProjectClient, wait_until
from tests.integration.training_script import BASE_FACTS
from tests.rows import colour_rows, jsonl
from tests.statements import is_one_waiting

NAME = "ft:tiny-llama:personal:mine:abcdefgh:ckpt-step-3"
# Bases have no slash here; a name from elsewhere may.
SLASHED = "ft:org/tiny:personal::abcdefgi"


@pytest.fixture
def owner(api: Api, client: openai.OpenAI, file_id: str) -> openai.OpenAI:
    job_id = api.create_job(file_id)["id"]
    with api.state.database.transaction() as session:
        for step, name in enumerate((NAME, SLASHED)):
            job = session.get_one(Job, job_id)
            add_model(session, job, name, kind="checkpoint", step=step, artifact_digest="sha256:d")
    return client


def _chat(project: ProjectClient) -> int:
    body = {"model": NAME, "messages": [{"role": "user", "content": "hi"}]}
    return project.ask("POST", "/chat/completions", body).status_code


def _tuned(project: ProjectClient) -> set[str]:
    listed = project.ok("GET", "/models")["data"]
    return {model["id"] for model in listed if model["id"].startswith("ft:")}


def test_a_project_may_call_a_shared_model_until_the_permission_is_deleted(
    api: Api, owner: openai.OpenAI
) -> None:
    other, third = api.other_project(), api.other_project("third")
    assert _chat(other) == 404
    made = owner.fine_tuning.checkpoints.permissions.create(NAME, project_ids=[other.project_id]).data
    assert [(one.object, one.project_id) for one in made] == [("checkpoint.permission", other.project_id)]

    assert _chat(other) == 200
    _, _, target = api.backend.asked[-1]
    assert (target.model, target.digest) == (NAME, "sha256:d")
    assert _tuned(other) == {NAME}
    assert other.client().models.retrieve(NAME).id == NAME
    assert _chat(third) == 404
    assert _tuned(third) == set()

    for method, path in (("DELETE", ""), ("GET", "/files"), ("GET", "/files/README.md")):
        assert other.refused(method, f"/models/{NAME}{path}")[:2] == (403, "missing_scope"), path
    continuing = {"model": NAME, "training_file": other.upload_file(jsonl(colour_rows(12)))}
    status, *_, message = other.refused("POST", "/fine_tuning/jobs", continuing)
    assert status == 400
    assert "another project's model; a job continues" in message
    permissions_path = f"/fine_tuning/checkpoints/{NAME}/permissions"
    assert other.refused("GET", permissions_path)[0] == 404
    assert other.refused("POST", permissions_path, {"project_ids": [third.project_id]})[0] == 404

    gone = owner.fine_tuning.checkpoints.permissions.delete(made[0].id, fine_tuned_model_checkpoint=NAME)
    assert (gone.id, gone.deleted, gone.object) == (made[0].id, True, "checkpoint.permission")
    assert _chat(other) == 404
    assert _tuned(other) == set()
    with pytest.raises(openai.NotFoundError):
        owner.fine_tuning.checkpoints.permissions.delete(made[0].id, fine_tuned_model_checkpoint=NAME)


def test_a_deleted_model_is_no_longer_shared(api: Api, owner: openai.OpenAI) -> None:
    other = api.other_project()
    owner.fine_tuning.checkpoints.permissions.create(NAME, project_ids=[other.project_id])
    owner.models.delete(NAME)
    assert _chat(other) == 404


def _register(session: Session, job_id: str, kind: str, step: int, name: str) -> None:
    job = session.get_one(Job, job_id)
    spec = TrainingSpec.model_validate(job.spec).model_copy(update={"base": BASE_FACTS})
    made = {"artifact_key": "k", "artifact_digest": "sha256:d", "metrics": {}}
    models.register(session, job, spec, name=name, kind=kind, step=step, **made)


def _delete(_session: Session, owner: openai.OpenAI, _job_id: str) -> None:
    owner.models.delete(f"{NAME}0")


def _retire(session: Session, _owner: openai.OpenAI, job_id: str) -> None:
    _register(session, job_id, "checkpoint", 11, f"{NAME}1")
    models.retire_checkpoints(session, job_id, keep=1, spared_step=None)


@pytest.mark.parametrize("end", [_delete, _retire])
def test_a_checkpoint_that_comes_back_as_the_result_is_no_longer_shared(
    api: Api, owner: openai.OpenAI, end: Callable[[Session, openai.OpenAI, str], None]
) -> None:
    other = api.other_project()
    job_id = owner.fine_tuning.jobs.list().data[0].id
    transaction = api.state.database.transaction
    with transaction() as session:
        _register(session, job_id, "checkpoint", 10, f"{NAME}0")
    owner.fine_tuning.checkpoints.permissions.create(f"{NAME}0", project_ids=[other.project_id])
    assert _tuned(other) == {f"{NAME}0"}
    with transaction() as session:
        end(session, owner, job_id)
    assert _tuned(other) == set()
    with transaction() as session:
        _register(session, job_id, "tuned", 10, "ft:tiny-llama:personal::abcdefgh")
    assert owner.models.retrieve("ft:tiny-llama:personal::abcdefgh")
    assert _tuned(other) == set()
    assert list(owner.fine_tuning.checkpoints.permissions.list("ft:tiny-llama:personal::abcdefgh")) == []


def test_none_is_granted_while_the_model_is_being_deleted(api: Api, owner: openai.OpenAI) -> None:
    other = api.other_project()
    database = api.state.database
    with database.transaction() as session:
        job = session.query(Job).one()
        scope = Principal(job.organization_id, "personal", job.project_id, None)

    def grant() -> None:
        with database.transaction() as granting:
            permissions.create(granting, scope, NAME, [other.project_id])

    with ThreadPoolExecutor(1) as threads:
        with database.transaction() as deleting:
            models.delete(deleting, scope, api.state.catalogue, NAME)
            granted = threads.submit(grant)
            wait_until(lambda: is_one_waiting(database), what="the grant waits for the deletion")
        with pytest.raises(ModelNotFoundError):
            granted.result(timeout=30)


def test_permissions_are_paged_in_both_orders_and_filtered(api: Api, owner: openai.OpenAI) -> None:
    sdk = owner.fine_tuning.checkpoints.permissions
    projects = [api.other_project(f"p{n}").project_id for n in range(5)]
    made = [sdk.create(NAME, project_ids=[project]).data[0].id for project in projects]
    assert [one.id for one in sdk.list(NAME, limit=2)] == made[::-1]
    assert [one.id for one in sdk.list(NAME, limit=2, order="ascending")] == made
    assert [one.id for one in sdk.list(NAME, project_id=projects[3])] == [made[3]]
    with pytest.warns(DeprecationWarning):
        page = sdk.retrieve(NAME, limit=2, order="ascending")
    assert (page.first_id, page.last_id, page.has_more) == (made[0], made[1], True)
    assert sdk.list(NAME, limit=0).data == []
    sdk.delete(made[3], fine_tuned_model_checkpoint=NAME)
    assert [one.id for one in sdk.list(NAME, after=made[3])] == made[2::-1]
    made[3] = sdk.create(NAME, project_ids=[projects[3]]).data[0].id
    # What is there already is answered again, and no twin is made.
    again = sdk.create(NAME, project_ids=[projects[0], projects[0], projects[1]]).data
    assert [one.id for one in again] == made[:2]
    assert len(list(sdk.list(NAME))) == 5


def test_bad_permissions_name_their_field_and_grant_nothing(api: Api, owner: openai.OpenAI) -> None:
    other = api.other_project()
    path = f"/fine_tuning/checkpoints/{NAME}/permissions"
    own_id = api.ok("GET", "/keys")["data"][-1]["project_id"]
    for body, param in (
        ({"project_ids": [other.project_id, "proj_nope"]}, "project_ids.1"),
        ({"project_ids": [own_id]}, "project_ids.0"),
        ({"project_ids": []}, "project_ids"),
        ({"project_ids": other.project_id}, "project_ids"),
        ({}, "project_ids"),
        ({"project_ids": [other.project_id], "role": "x"}, "role"),
    ):
        refused = api.refused("POST", path, body)
        assert (refused[0], refused[2]) == (400, param), refused
    for query, param in (("order=asc", "order"), ("after=cp_nope", "after"), ("limit=-1", "limit")):
        refused = api.refused("GET", f"{path}?{query}")
        assert (refused[0], refused[2]) == (400, param), refused
    assert list(owner.fine_tuning.checkpoints.permissions.list(NAME)) == []
    unknown = path.replace(NAME, "ft:tiny-llama:personal::nothere1")
    refused = api.refused("POST", unknown, {"project_ids": [other.project_id]})
    assert refused[:2] == (404, "model_not_found")


def test_names_reach_their_model_however_a_client_escapes_them(api: Api, owner: openai.OpenAI) -> None:
    other = api.other_project()
    for name in (NAME, SLASHED):
        (made,) = owner.fine_tuning.checkpoints.permissions.create(name, project_ids=[other.project_id]).data
        for spelled in (quote(name, safe=":"), quote(name, safe="")):
            path = f"/fine_tuning/checkpoints/{spelled}/permissions"
            assert [one["id"] for one in api.ok("GET", path)["data"]] == [made.id]
        assert api.ok("DELETE", f"{path}/{made.id}")["deleted"] is True
