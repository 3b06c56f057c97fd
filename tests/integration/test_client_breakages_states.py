"""What real clients break on if a job, in any of its statuses, or an id is not as they know it.

The numbers are those of test_client_breakages.py.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob
from sqlalchemy import update

from db.tables import Model
from luthier.client import LuthierClient
from luthier.core.errors import NonFiniteLossError
from luthier.core.states import JobStatus
from services.jobs import leases
from tests.conftest import Api, Server, fresh_database, make_settings, serve_api
from tests.integration.training_script import run_script
from tests.rows import colour_rows, jsonl
from tests.training import make_worker
from worker.tasks.prepare import prepare
from worker.tasks.train import claim


@pytest.fixture(scope="module")
def api(postgres: Server, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with fresh_database(postgres) as database:
        settings = make_settings(database, tiny_base, tmp_path_factory.mktemp("breakages"))
        # An operator's name for a base, such as people take from a hub.
        path = settings.models_file
        path.write_text(path.read_text() + '"org/model:tag" = "tiny-llama"\n')
        with serve_api(settings, database) as served:
            yield served


@pytest.fixture(scope="module")
def client(api: Api) -> openai.OpenAI:
    return api.client(is_strict=False)


def _three_epochs(script: Any) -> None:
    script.start().epoch(1, 5.0).epoch(2, 4.0).epoch(3, 3.0).finish(3)


@pytest.fixture(scope="module")
def jobs_by_status(api: Api, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A job in each status, as the wire shows it; the training process is scripted."""
    found: dict[str, dict[str, Any]] = {}
    context, file_id = make_worker(api.state.settings, api), api.upload_file(jsonl(colour_rows()))

    def keep(job_id: str, *verbs: str) -> None:
        for verb in verbs:
            api.ok("POST", f"/fine_tuning/jobs/{job_id}/{verb}")
        job = api.ok("GET", f"/fine_tuning/jobs/{job_id}")
        found[job["status"]] = job

    keep(api.create_job(file_id)["id"])
    keep(api.create_job(file_id)["id"], "cancel")
    for _ in range(2):  # one that succeeds, one that fails
        job_id = api.create_job(file_id)["id"]
        prepare(context, job_id)
        if "queued" not in found:
            keep(job_id)
            keep(job_id, "pause")
            keep(job_id, "resume")
        claimed = claim(context)
        assert claimed is not None
        if "running" not in found:
            keep(job_id)
            folder = tmp_path_factory.mktemp("run")
            run_script(context, folder, _three_epochs, epochs=3, claimed=claimed)
            keep(job_id)
        else:
            keep(job_id, "pause")
            with context.database.transaction() as session:
                leases.fail(session, claimed.lease, NonFiniteLossError("Loss of step 1 is not finite."))
            keep(job_id)
    assert set(found) == {status.value for status in JobStatus}
    return found


def test_auto_is_echoed_and_later_replaced_by_numbers(jobs_by_status: dict[str, dict[str, Any]]) -> None:
    early = jobs_by_status["validating_files"]["hyperparameters"]
    assert set(early.values()) == {"auto"}
    for status in ("queued", "running", "succeeded"):
        job = jobs_by_status[status]
        for numbers in (job["hyperparameters"], job["method"]["supervised"]["hyperparameters"]):
            assert type(numbers["n_epochs"]) is int
            assert type(numbers["batch_size"]) is int
            assert type(numbers["learning_rate_multiplier"]) in (int, float)


@pytest.mark.parametrize("status", [status.value for status in JobStatus])
def test_a_job_in_every_status_has_the_types_that_typed_clients_read(
    status: str, jobs_by_status: dict[str, dict[str, Any]]
) -> None:
    job = jobs_by_status[status]
    assert (job["object"], job["status"]) == ("fine_tuning.job", status)
    assert isinstance(job["result_files"], list)
    assert isinstance(job["organization_id"], str)
    assert type(job["seed"]) is int
    assert isinstance(job["hyperparameters"], dict)
    # 20: `{}` would be an error to some; 21: many take a name for the end.
    assert (job["error"] is not None) == (status == "failed")
    if job["error"] is not None:
        assert set(job["error"]) == {"code", "message", "param"}
    assert (job["fine_tuned_model"] is not None) == (status == "succeeded")
    assert (job["trained_tokens"] is not None) == (status == "succeeded")
    assert len(job["result_files"]) == (status == "succeeded")
    # 23: whole seconds, and a finish for every end.
    assert type(job["created_at"]) is int
    assert (type(job["finished_at"]) is int) == JobStatus(status).is_terminal
    assert job["estimated_finish"] is None or type(job["estimated_finish"]) is int


def test_statuses_are_those_of_the_sdks_types_but_for_a_pause(
    jobs_by_status: dict[str, dict[str, Any]],
) -> None:
    known = set(FineTuningJob.model_fields["status"].annotation.__args__)
    assert set(jobs_by_status) - known == {"pausing", "paused"}


def test_ids_with_colons_and_slashes_are_one_segment_however_encoded(
    api: Api, client: openai.OpenAI, jobs_by_status: dict[str, dict[str, Any]]
) -> None:
    name = jobs_by_status["succeeded"]["fine_tuned_model"]
    assert "::" in name
    earlier = f"/fine_tuning/jobs/{jobs_by_status['succeeded']['id']}/checkpoints"
    checkpoint = api.ok("GET", earlier)["data"][-1]["fine_tuned_model_checkpoint"]
    assert ":ckpt-step-" in checkpoint
    for model in (name, checkpoint):
        for path in (model, model.replace(":", "%3A"), model.replace(":", "%3a")):
            assert api.ok("GET", f"/models/{path}")["id"] == model
            assert api.ok("GET", f"/models/{path}/files")["data"]
    for path in ("org%2Fmodel:tag", "org%2fmodel%3Atag"):
        assert api.ok("GET", f"/models/{path}")["id"] == "org/model:tag"
    assert client.models.retrieve("org/model:tag").id == "org/model:tag"
    for path in ("/models/a%2Fb", "/fine_tuning/jobs/a%2Fb", "/fine_tuning/jobs/a%3Ab/events"):
        assert api.refused("GET", path)[1] in {"not_found", "model_not_found"}, path
    assert "a/b" in api.refused("GET", "/fine_tuning/jobs/a%2Fb")[3]
    # An id can't be used to climb to another route.
    assert api.refused("GET", "/fine_tuning/jobs%2Fftjob-1")[1] == "unknown_url"


def test_checkpoints_leave_out_what_was_not_measured_and_the_last_has_the_models_name(
    api: Api, jobs_by_status: dict[str, dict[str, Any]]
) -> None:
    job = jobs_by_status["succeeded"]
    found = api.ok("GET", f"/fine_tuning/jobs/{job['id']}/checkpoints")["data"]
    assert [checkpoint["step_number"] for checkpoint in found] == [3, 2, 1]
    assert found[0]["fine_tuned_model_checkpoint"] == job["fine_tuned_model"]
    for checkpoint in found:
        assert checkpoint["metrics"]["step"] == checkpoint["step_number"]
        metrics = checkpoint["metrics"]
        assert metrics.get("valid_loss") == metrics.get("full_valid_loss")
        assert all(math.isfinite(value) for value in checkpoint["metrics"].values())


def test_models_whose_names_hold_slashes_are_read_downloaded_and_deleted(
    api: Api, client: openai.OpenAI, jobs_by_status: dict[str, dict[str, Any]]
) -> None:
    earlier = f"/fine_tuning/jobs/{jobs_by_status['succeeded']['id']}/checkpoints"
    checkpoint = api.ok("GET", earlier)["data"][-1]["fine_tuned_model_checkpoint"]
    name = "ft:org/base:o::id:ckpt-step-1"
    with api.state.database.transaction() as session:
        session.execute(update(Model).where(Model.name == checkpoint).values(name=name))
    # The last is how the SDKs before 3 send it.
    for path in ("ft:org%2Fbase:o::id:ckpt-step-1", "ft%3Aorg%2fbase%3Ao%3A%3Aid%3Ackpt-step-1", name):
        assert api.ok("GET", f"/models/{path}")["id"] == name
    assert client.models.retrieve(name).id == name
    with LuthierClient(f"{api.base_url}/v1", api.key) as ours:
        (first, *_) = ours.list_model_files(name)
    path = f"/models/ft:org%2Fbase:o::id:ckpt-step-1/files/{quote(first['name'], safe='')}"
    answer = api.ask("GET", path)
    assert (answer.status_code, len(answer.content)) == (200, first["bytes"])
    deleted = client.models.delete(name)
    assert (deleted.id, deleted.deleted) == (name, True)
    for gone in (name, "org/model:tag"):
        with pytest.raises(openai.APIStatusError) as refused:
            client.models.delete(gone)
        assert refused.value.status_code == (404 if gone == name else 403)
    assert api.ask("DELETE", "/models/org/model:tag").json() == refused.value.response.json()
    assert api.refused("GET", "/models/")[1] == "model_not_found"
