"""A project with two tuned models and a checkpoint, which speaks of its aliases over HTTP."""

from typing import Any
from urllib.parse import quote

import httpx2
import openai
from sqlalchemy import select
from sqlalchemy.orm import Session

from db.tables import Base, Job, Model
from luthier.core.ids import new_id
from services.accounts.auth import Principal
from tests.conftest import TINY_BASE, Api
from tests.rows import colour_rows, jsonl

V1, V2, CHECKPOINT = (f"ft:tiny-llama:personal::abcdefg{end}" for end in ("1", "2", "3:ckpt-step-3"))
DIGESTS = {V1: "sha256:1", V2: "sha256:2", CHECKPOINT: "sha256:3", TINY_BASE: None}


class Aliases:
    """Speaks of aliases as one project, and of the models in it."""

    def __init__(self, api: Api, key: str) -> None:
        self._url = f"{api.base_url}/v1"
        self._headers = {"Authorization": f"Bearer {key}"}

    def ask(self, method: str, path: str, body: Any = None) -> httpx2.Response:
        return httpx2.request(method, self._url + path, headers=self._headers, json=body, timeout=30)

    def ok(self, method: str, path: str, body: Any = None) -> dict[str, Any]:
        answer = self.ask(method, path, body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def put(self, name: str, model: str) -> dict[str, Any]:
        return self.ok("PUT", f"/aliases/{quote(name, safe='')}", {"model": model})

    def refused(self, method: str, path: str, body: Any = None) -> tuple[int, str, str, str]:
        answer = self.ask(method, path, body)
        assert answer.status_code >= 400, answer.text
        error = answer.json()["error"]
        return answer.status_code, error["code"], error["param"], error["message"]


def make_ours(api: Api) -> Aliases:
    """Return the project `personal`, with the models in it."""
    client = openai.OpenAI(base_url=f"{api.base_url}/v1", api_key=api.key, max_retries=0)
    file = client.files.create(file=("rows.jsonl", jsonl(colour_rows())), purpose="fine-tune")
    job_id = client.fine_tuning.jobs.create(model=TINY_BASE, training_file=file.id).id
    with api.state.database.transaction() as session:
        _add_models(session, session.get_one(Job, job_id))
    return Aliases(api, api.key)


def _add_models(session: Session, job: Job) -> None:
    for step, name in enumerate((V1, V2, CHECKPOINT)):
        session.add(
            Model(
                id=new_id("model"),
                organization_id=job.organization_id,
                project_id=job.project_id,
                name=name,
                kind="checkpoint" if name == CHECKPOINT else "tuned",
                base_id=TINY_BASE,
                base_digest=session.get_one(Base, TINY_BASE).digest,
                job_id=job.id,
                method="lora",
                step=step,
                artifact_key=f"k{step}",
                artifact_digest=str(DIGESTS[name]),
            )
        )


def scope_of(api: Api) -> Principal:
    """Return the project's scope."""
    with api.state.database.transaction() as session:
        job = session.scalars(select(Job)).one()
        return Principal(job.organization_id, "personal", job.project_id, None)
