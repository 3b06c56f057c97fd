"""Metrics of the API and of a worker, as Prometheus reads them."""

import os
import subprocess
import sys

import httpx2
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from sqlalchemy import insert

from db.tables import Worker
from luthier.core.settings import Settings
from services.accounts.usage import TokenCounts
from tests.conftest import Api, wait_until
from tests.integration.wire import ask, create_job
from tests.rows import colour_rows, jsonl
from tests.stack import ROOT, free_port


def _samples(text: str) -> dict[str, float]:
    return {
        sample.name + "".join(f" {value}" for value in sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def _scrape(api: Api) -> dict[str, float]:
    answer = httpx2.get(f"{api.base_url}/metrics", headers=api.headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return _samples(answer.text)


def test_requests_are_counted_by_template_and_never_by_path(api: Api) -> None:
    for _ in range(2):
        ask(api, "GET", "/files/file-1")
    httpx2.get(f"{api.base_url}/v1/nothing", headers=api.headers)
    httpx2.request("PROPFIND", f"{api.base_url}/v1/files", headers=api.headers)
    wait_until(
        lambda: "http_server_request_duration_seconds_count PROPFIND /v1/files 405" in _scrape(api),
        seconds=10,
    )
    found = _scrape(api)
    counted = "http_server_request_duration_seconds_count"
    assert found[f"{counted} GET /v1/files/{{file_id}} 404"] == 2
    assert found[f"{counted} GET none 404"] == 1
    assert found["luthier_open_streams"] == 0
    assert found["process_resident_memory_bytes"] > 0


def test_jobs_slots_and_waits_are_read_from_the_database(api: Api) -> None:
    files = {"purpose": (None, "fine-tune"), "file": ("a.jsonl", jsonl(colour_rows()))}
    create_job(api, ask(api, "POST", "/files", files=files).json()["id"])
    with api.state.database.transaction() as session:
        session.execute(insert(Worker).values(id="w", hostname="h", num_slots=3, facts={}))
    found = _scrape(api)
    assert found["luthier_jobs validating_files"] == 1
    assert found["luthier_jobs queued"] == found["luthier_queue_wait_seconds"] == 0
    assert (found["luthier_workers"], found["luthier_training_slots_free"]) == (1, 3)
    assert found["luthier_database_up"] == 1


def test_a_plain_key_may_not_read_metrics_and_the_operators_token_reads_nothing_else(
    api: Api, settings: Settings
) -> None:
    plain = ask(api, "POST", "/keys", json={"name": "plain"}).json()["key"]
    headers = {"Authorization": f"Bearer {plain}"}
    assert httpx2.get(f"{api.base_url}/metrics", headers=headers).status_code == 403
    # No token is set: an empty one opens nothing.
    assert httpx2.get(f"{api.base_url}/metrics", headers={"Authorization": "Bearer"}).status_code == 401
    settings.metrics_token = SecretStr("prometheus")
    token = {"Authorization": "Bearer prometheus"}
    assert httpx2.get(f"{api.base_url}/metrics", headers=token).status_code == 200
    assert httpx2.get(f"{api.base_url}/v1/files", headers=token).status_code == 401


def test_tokens_are_counted_by_kind(api: Api) -> None:
    api.state.metrics.count_tokens(TokenCounts(1, 10, 4, 3))
    found = _scrape(api)
    kinds = [found[f"luthier_tokens_total {kind}"] for kind in ("input", "input_cached", "output")]
    assert kinds == [10, 4, 3]


def test_a_worker_serves_its_metrics_where_an_address_is_set(api: Api, settings: Settings) -> None:
    port = free_port()
    environment = os.environ | {
        "LUTHIER_DATABASE_URL": settings.database_url.get_secret_value(),
        "LUTHIER_STORAGE_URL": settings.storage_url,
        "LUTHIER_MODELS_FILE": str(settings.models_file),
        "LUTHIER_BASES_DIR": str(settings.bases_dir),
        "LUTHIER_RUNS_DIR": str(settings.runs_dir),
        "LUTHIER_WARM_SPARE_SECONDS": "0",
        "LUTHIER_TRAINING_SLOTS": "2",
        "LUTHIER_WORKER_METRICS_ADDRESS": f"127.0.0.1:{port}",
    }
    process = subprocess.Popen([sys.executable, "-m", "worker", "--no-broker"], cwd=ROOT, env=environment)
    found: dict[str, float] = {}

    def answers() -> bool:
        nonlocal found
        try:
            found = _samples(httpx2.get(f"http://127.0.0.1:{port}/metrics").text)
        except httpx2.TransportError:
            return False
        return True

    try:
        wait_until(answers, what="the worker serves its metrics")
        assert (found["luthier_worker_slots"], found["luthier_worker_slots_free"]) == (2, 2)
        assert found["luthier_worker_lease_age_seconds"] == 0
    finally:
        process.terminate()
        process.wait(timeout=30)
