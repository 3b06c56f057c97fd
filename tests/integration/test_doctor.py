"""What `luthier doctor` finds out about a service that runs."""

from pathlib import Path

import pytest

from luthier.cli.doctor import check_api, check_database
from luthier.core.errors import UnavailableError
from luthier.core.settings import Settings
from services.capacity import workers
from tests.conftest import Api, wait_until


def test_a_service_without_an_inference_server_is_reported_as_such(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def statuses(key: str = api.key) -> dict[str, str]:
        return {one.name: one.status for one in check_api(tmp_path, f"{api.base_url}/v1", key)}

    async def is_away() -> None:
        raise UnavailableError("No inference server answers.")

    assert statuses() == {"api": "ok", "key": "ok", "inference": "ok"}
    monkeypatch.setattr(api.backend, "health", is_away)
    # Readiness is looked at once a second at most.
    wait_until(lambda: statuses()["inference"] == "fail", what="the inference server is away")
    assert statuses("lt_wrong") == {"api": "ok", "key": "fail"}


def test_a_worker_that_claims_nothing_is_named_with_its_reason(
    api: Api, settings: Settings, tmp_path: Path
) -> None:
    def found() -> list[tuple[str, str]]:
        return [(one.name, one.status) for one in check_database(tmp_path, settings)]

    assert found() == [("database", "ok"), ("workers", "warn")]
    with api.state.database.transaction() as session:
        for worker_id in ("good", "bad"):
            workers.beat(session, worker_id, hostname=worker_id, num_slots=1, facts={})
    assert found() == [("database", "ok"), ("workers", "ok")]
    with api.state.database.transaction() as session:
        workers.quarantine(session, "bad", "no driver", pause_seconds=30)
    bad = check_database(tmp_path, settings)[1]
    assert (bad.name, bad.status) == ("worker", "fail")
    assert bad.detail.startswith("bad claims nothing to train: no driver")
