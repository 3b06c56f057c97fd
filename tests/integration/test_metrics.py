"""Metrics of the API and of a worker, as Prometheus reads them."""

from contextlib import suppress
from pathlib import Path

import httpx2
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from sqlalchemy import insert

from db.tables import Worker
from luthier.core.inference import TokenCounts
from luthier.core.settings import Settings
from tests.conftest import Api, wait_until
from tests.rows import colour_rows, jsonl
from tests.stack import free_port
from tests.workers import running_worker


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
        api.ask("GET", "/files/file-1")
    api.ask("GET", "/nothing")
    api.ask("PROPFIND", "/files")
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
    api.create_job(api.upload_file(jsonl(colour_rows())))
    with api.state.database.transaction() as session:
        session.execute(insert(Worker).values(id="w", hostname="h", num_slots=3, facts={}))
    found = _scrape(api)
    assert found["luthier_jobs validating_files"] == 1
    assert found["luthier_jobs queued"] == found["luthier_queue_wait_seconds"] == 0
    assert (found["luthier_workers"], found["luthier_training_slots_free"]) == (1, 3)
    assert found["luthier_database_up"] == 1


def test_a_plain_key_reads_no_metrics_and_their_token_nothing_else(api: Api, settings: Settings) -> None:
    plain = api.ask("POST", "/keys", body={"name": "plain"}).json()["key"]
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


def test_a_worker_serves_its_metrics_at_an_address(api: Api, settings: Settings, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    changed = settings.model_copy(update={"training_slots": 2, "worker_metrics_address": address})
    found: dict[str, float] = {}

    def answers() -> bool:
        with suppress(httpx2.TransportError):
            found.update(_samples(httpx2.get(f"http://{address}/metrics").text))
        return bool(found)

    with running_worker(changed, tmp_path / "worker.log", "--no-broker"):
        wait_until(answers, what="the worker serves its metrics")
    assert (found["luthier_worker_slots"], found["luthier_worker_slots_free"]) == (2, 2)
    assert found["luthier_worker_lease_age_seconds"] == 0
