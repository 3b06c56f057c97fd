"""The API's process in front of a server of ours, over a database of its own."""

import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from benchmarks.serve.artifacts import Published
from benchmarks.serve.engine import COMPLETIONS, OurServer, completion_body
from benchmarks.serve.process import Process, SideFailedError, free_port
from benchmarks.serve.prompts import Prompt
from benchmarks.throw_away import throw_away_postgres
from benchmarks.train.contestants import quiet_environment
from db.session import Database
from db.tables import File, Job, Model, Project
from luthier.bases.catalogue import find_base_facts
from luthier.core.ids import new_api_key, new_id
from luthier.core.settings import Settings
from luthier.core.specs import BaseFacts
from services.bootstrap import ensure_first_rows
from services.models.models import record_base

_START_SECONDS = 60.0
_FASTER_DATABASE = ("fsync=off",)


@dataclass(frozen=True)
class Api:
    """Its address and its key."""

    url: str
    key: str

    @property
    def headers(self) -> dict[str, str]:
        """The headers of every request."""
        return {"authorization": f"Bearer {self.key}"}

    def request(self, model: str, prompt: Prompt, *, num_new: int, at_seconds: float = 0.0) -> dict[str, Any]:
        """Return one request for a number of tokens, the most probable ones.

        Args:
            model: public name of a base, a tuned model or an alias.
            prompt: what it continues.
            num_new: tokens to be made.
            at_seconds: when it is sent.
        """
        return {
            "path": COMPLETIONS,
            "headers": self.headers,
            "body": completion_body(model, prompt.token_ids, num_new=num_new),
            "at_seconds": at_seconds,
        }


@contextmanager
def api_in_front(server: OurServer, models: Sequence[Published] = ()) -> Iterator[Api]:
    """Run an API process for the length of a block.

    Args:
        server: our inference server, running.
        models: tuned models that it shall know, each by its name.

    Yields:
        The API, listening.
    """
    key = new_api_key()
    with tempfile.TemporaryDirectory(prefix="lt-front-", dir="/tmp") as name:
        folder = Path(name)
        # The database's user must pass through it.
        folder.chmod(0o755)
        with throw_away_postgres(folder, _FASTER_DATABASE) as url:
            _fill(url, key, server, models)
            port = free_port()
            environment = quiet_environment(os.cpu_count() or 1) | {
                "LUTHIER_DATABASE_URL": url,
                "LUTHIER_REDIS_URL": "redis+socket:///nowhere",
                "LUTHIER_STORAGE_URL": f"file://{server.place.objects}",
                "LUTHIER_BASES_DIR": str(server.place.bases_dir),
                "LUTHIER_INFERENCE_URL": server.url,
                "LUTHIER_INTERNAL_TOKEN": server.token,
            }
            log = folder / "api.log"
            process = Process([sys.executable, "-m", "api", "--port", str(port)], environment, log)
            try:
                _wait_for(port, process)
                yield Api(f"http://127.0.0.1:{port}", key)
            finally:
                process.close()


def _fill(url: str, key: str, server: OurServer, models: Sequence[Published]) -> None:
    settings = Settings(_env_file=None, database_url=url, bootstrap_api_key=key)  # type: ignore[call-arg]
    facts = find_base_facts(server.place.bases_dir, server.place.base_id)
    assert facts is not None, "the server has loaded it"
    database = Database(url, pool_size=1)
    with database.transaction() as session:
        ensure_first_rows(session, settings)
        record_base(session, facts)
        if models:
            _add_models(session, facts, models)
    database.close()


def _add_models(session: Session, facts: BaseFacts, models: Sequence[Published]) -> None:
    """Add the rows that a job of each would have left."""
    project = session.scalars(select(Project)).first()
    assert project is not None, "the first rows have one"
    owner = {"organization_id": project.organization_id, "project_id": project.id}
    file = File(
        id=new_id("file"),
        **owner,
        filename="rows.jsonl",
        purpose="fine-tune",
        num_bytes=0,
        num_rows=0,
        sha256="0" * 64,
        storage_key="none",
    )
    session.add(file)
    session.flush()
    job = Job(
        id=new_id("job"),
        **owner,
        status="succeeded",
        model=facts.id,
        base_id=facts.id,
        spec={},
        training_file_id=file.id,
        seed=1,
    )
    session.add(job)
    session.flush()
    for step, model in enumerate(models):
        session.add(
            Model(
                id=new_id("model"),
                **owner,
                name=model.name,
                kind="tuned",
                base_id=facts.id,
                base_digest=facts.digest,
                job_id=job.id,
                method=model.kind,
                step=step,
                artifact_key=model.prefix,
                artifact_digest=model.digest,
            )
        )


def _wait_for(port: int, process: Process) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        process.check()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise SideFailedError(f"the API did not listen within {_START_SECONDS:.0f} s")
