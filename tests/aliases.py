"""A project with two tuned models and a checkpoint, which speaks of its aliases over HTTP."""

from typing import Any
from urllib.parse import quote

from sqlalchemy import select
from sqlalchemy.orm import Session

from db.tables import Base, Job, Model
from luthier.core.ids import new_id
from services.accounts.auth import Principal
from tests.conftest import TINY_BASE, Api, ProjectClient
from tests.rows import colour_rows, jsonl

V1, V2, CHECKPOINT = (f"ft:tiny-llama:personal::abcdefg{end}" for end in ("1", "2", "3:ckpt-step-3"))
DIGESTS = {V1: "sha256:1", V2: "sha256:2", CHECKPOINT: "sha256:3", TINY_BASE: None}


class Aliases(ProjectClient):
    """Speaks of aliases as one project, and of the models in it."""

    def put(self, name: str, model: str) -> dict[str, Any]:
        return self.ok("PUT", f"/aliases/{quote(name, safe='')}", {"model": model})


def make_ours(api: Api) -> Aliases:
    """Return the project `personal`, with the models in it."""
    job_id = api.create_job(api.upload_file(jsonl(colour_rows())))["id"]
    with api.state.database.transaction() as session:
        job = session.get_one(Job, job_id)
        for step, name in enumerate((V1, V2, CHECKPOINT)):
            kind = "checkpoint" if name == CHECKPOINT else "tuned"
            add_model(session, job, name, kind=kind, step=step, artifact_digest=str(DIGESTS[name]))
    return Aliases(api.http, api.key)


def add_model(
    session: Session, job: Job, name: str, *, step: int, artifact_digest: str, **columns: Any
) -> None:
    """Give a job a model that no run has trained."""
    values = {"kind": "tuned", "method": "lora", "artifact_key": f"k{step}"} | columns
    session.add(
        Model(
            id=new_id("model"),
            organization_id=job.organization_id,
            project_id=job.project_id,
            name=name,
            base_id=job.base_id,
            base_digest=session.get_one(Base, job.base_id).digest,
            job_id=job.id,
            step=step,
            artifact_digest=artifact_digest,
            **values,
        )
    )


def scope_of(api: Api) -> Principal:
    """Return the project's scope."""
    with api.state.database.transaction() as session:
        job = session.scalars(select(Job)).one()
        return Principal(job.organization_id, "personal", job.project_id, None)
