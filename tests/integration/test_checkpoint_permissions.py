"""Sharing a model with another project: who may call it, and what else they may not do."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import quote

import httpx2
import openai
import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from db.tables import Job, Model
from luthier.core.errors import ModelNotFoundError
from luthier.core.ids import new_id
from luthier.core.specs import TrainingSpec
from services.accounts.auth import Principal
from services.models import models, permissions
from tests.conftest import Api, wait_until
from tests.integration.training_script import BASE_FACTS
from tests.rows import colour_rows, jsonl

NAME = "ft:tiny-llama:personal:mine:abcdefgh:ckpt-step-3"
# Bases have no slash here; a name from elsewhere may.
SLASHED = "ft:org/tiny:personal::abcdefgi"


@dataclass
class Project:
    id: str
    client: openai.OpenAI
    headers: dict[str, str]


def _client(api: Api, key: str) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{api.base_url}/v1", api_key=key, max_retries=0, _strict_response_validation=True
    )


@pytest.fixture
def owner(api: Api) -> openai.OpenAI:
    client = _client(api, api.key)
    file = client.files.create(file=("rows.jsonl", jsonl(colour_rows())), purpose="fine-tune")
    job_id = client.fine_tuning.jobs.create(model="tiny-llama", training_file=file.id).id
    with api.state.database.transaction() as session:
        job = session.get_one(Job, job_id)
        for step, name in enumerate((NAME, SLASHED)):
            session.add(
                Model(
                    id=new_id("model"),
                    organization_id=job.organization_id,
                    project_id=job.project_id,
                    name=name,
                    kind="checkpoint",
                    base_id="tiny-llama",
                    base_digest="b",
                    job_id=job.id,
                    method="lora",
                    step=step,
                    artifact_key="k",
                    artifact_digest="sha256:d",
                )
            )
    return client


def _project(api: Api, name: str) -> Project:
    body = {"name": name, "project": name}
    made = httpx2.post(f"{api.base_url}/v1/keys", headers=api.headers, json=body).json()
    headers = {"Authorization": f"Bearer {made['key']}"}
    return Project(made["project_id"], _client(api, made["key"]), headers)


def _chat(api: Api, project: Project) -> int:
    body = {"model": NAME, "messages": [{"role": "user", "content": "hi"}]}
    url = f"{api.base_url}/v1/chat/completions"
    return httpx2.post(url, headers=project.headers, json=body).status_code


def test_a_project_may_call_a_shared_model_until_the_permission_is_deleted(
    api: Api, owner: openai.OpenAI
) -> None:
    other, third = _project(api, "other"), _project(api, "third")
    assert _chat(api, other) == 404
    made = owner.fine_tuning.checkpoints.permissions.create(NAME, project_ids=[other.id]).data
    assert [(one.object, one.project_id) for one in made] == [("checkpoint.permission", other.id)]

    assert _chat(api, other) == 200
    _, _, target = api.backend.asked[-1]
    assert (target.model, target.digest) == (NAME, "sha256:d")
    assert NAME in {model.id for model in other.client.models.list()}
    assert other.client.models.retrieve(NAME).id == NAME
    assert _chat(api, third) == 404
    assert NAME not in {model.id for model in third.client.models.list()}

    for method, path in (("DELETE", ""), ("GET", "/files"), ("GET", "/files/README.md")):
        answer = httpx2.request(method, f"{api.base_url}/v1/models/{NAME}{path}", headers=other.headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "missing_scope"), path
    file = other.client.files.create(file=("rows.jsonl", jsonl(colour_rows(12))), purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match="another project's model; a job continues"):
        other.client.fine_tuning.jobs.create(model=NAME, training_file=file.id)
    with pytest.raises(openai.NotFoundError):
        list(other.client.fine_tuning.checkpoints.permissions.list(NAME))
    with pytest.raises(openai.NotFoundError):
        other.client.fine_tuning.checkpoints.permissions.create(NAME, project_ids=[third.id])

    gone = owner.fine_tuning.checkpoints.permissions.delete(made[0].id, fine_tuned_model_checkpoint=NAME)
    assert (gone.id, gone.deleted, gone.object) == (made[0].id, True, "checkpoint.permission")
    assert _chat(api, other) == 404
    assert NAME not in {model.id for model in other.client.models.list()}
    with pytest.raises(openai.NotFoundError):
        owner.fine_tuning.checkpoints.permissions.delete(made[0].id, fine_tuned_model_checkpoint=NAME)


def test_a_deleted_model_is_no_longer_shared(api: Api, owner: openai.OpenAI) -> None:
    other = _project(api, "other")
    owner.fine_tuning.checkpoints.permissions.create(NAME, project_ids=[other.id])
    owner.models.delete(NAME)
    assert _chat(api, other) == 404


def _register(session: Session, job_id: str, kind: str, step: int, name: str) -> None:
    job = session.get_one(Job, job_id)
    spec = TrainingSpec.model_validate(job.spec).model_copy(update={"base": BASE_FACTS})
    made = {"artifact_key": "k", "artifact_digest": "sha256:d", "metrics": {}}
    models.register(session, job, spec, name=name, kind=kind, step=step, **made)  # type: ignore[arg-type]


def _tuned(project: Project) -> set[str]:
    return {model.id for model in project.client.models.list() if model.id.startswith("ft:")}


def _delete(_session: Session, owner: openai.OpenAI, _job_id: str) -> None:
    owner.models.delete(f"{NAME}0")


def _retire(session: Session, _owner: openai.OpenAI, job_id: str) -> None:
    _register(session, job_id, "checkpoint", 11, f"{NAME}1")
    models.retire_checkpoints(session, job_id, keep=1, spared_step=None)


@pytest.mark.parametrize("end", [_delete, _retire])
def test_a_checkpoint_that_comes_back_as_the_result_is_no_longer_shared(
    api: Api, owner: openai.OpenAI, end: Callable[[Session, openai.OpenAI, str], None]
) -> None:
    other = _project(api, "other")
    job_id = owner.fine_tuning.jobs.list().data[0].id
    transaction = api.state.database.transaction
    with transaction() as session:
        _register(session, job_id, "checkpoint", 10, f"{NAME}0")
    owner.fine_tuning.checkpoints.permissions.create(f"{NAME}0", project_ids=[other.id])
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
    other = _project(api, "other")
    database = api.state.database
    with database.transaction() as session:
        job = session.query(Job).one()
        scope = Principal(job.organization_id, "personal", job.project_id, None)

    def grant() -> None:
        with database.transaction() as granting:
            permissions.create(granting, scope, NAME, [other.id])

    waiting = text(
        "SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid) "
        "WHERE NOT granted AND datname = current_database()"
    )

    def is_waiting() -> bool:
        with database.engine.connect() as connection:
            return bool(connection.execute(waiting).scalar_one())

    with ThreadPoolExecutor(1) as threads:
        with database.transaction() as deleting:
            models.delete(deleting, scope, api.state.catalogue, NAME)
            granted = threads.submit(grant)
            wait_until(is_waiting, what="the grant waits for the deletion")
        with pytest.raises(ModelNotFoundError):
            granted.result(timeout=30)


def test_permissions_are_paged_in_both_orders_and_filtered(api: Api, owner: openai.OpenAI) -> None:
    sdk = owner.fine_tuning.checkpoints.permissions
    projects = [_project(api, f"p{n}").id for n in range(5)]
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
    other = _project(api, "other")
    url = f"{api.base_url}/v1/fine_tuning/checkpoints/{NAME}/permissions"
    own_id = httpx2.get(f"{api.base_url}/v1/keys", headers=api.headers).json()["data"][-1]["project_id"]
    for body, param in (
        ({"project_ids": [other.id, "proj_nope"]}, "project_ids.1"),
        ({"project_ids": [own_id]}, "project_ids.0"),
        ({"project_ids": []}, "project_ids"),
        ({"project_ids": other.id}, "project_ids"),
        ({}, "project_ids"),
        ({"project_ids": [other.id], "role": "x"}, "role"),
    ):
        answer = httpx2.post(url, headers=api.headers, json=body)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    for query, param in (("order=asc", "order"), ("after=cp_nope", "after"), ("limit=-1", "limit")):
        answer = httpx2.get(f"{url}?{query}", headers=api.headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    assert list(owner.fine_tuning.checkpoints.permissions.list(NAME)) == []
    unknown = url.replace(NAME, "ft:tiny-llama:personal::nothere1")
    answer = httpx2.post(unknown, headers=api.headers, json={"project_ids": [other.id]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")


def test_names_reach_their_model_however_a_client_escapes_them(api: Api, owner: openai.OpenAI) -> None:
    other = _project(api, "other")
    for name in (NAME, SLASHED):
        (made,) = owner.fine_tuning.checkpoints.permissions.create(name, project_ids=[other.id]).data
        for spelled in (quote(name, safe=":"), quote(name, safe="")):
            url = f"{api.base_url}/v1/fine_tuning/checkpoints/{spelled}/permissions"
            listed = httpx2.get(url, headers=api.headers).json()
            assert [one["id"] for one in listed["data"]] == [made.id]
        assert httpx2.delete(f"{url}/{made.id}", headers=api.headers).json()["deleted"] is True
