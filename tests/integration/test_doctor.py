"""What `luthier doctor` finds out about a service that runs."""

from pathlib import Path

import pytest

from luthier.cli.doctor.service import check_api
from luthier.core.errors import UnavailableError
from tests.conftest import Api


def test_a_service_whose_inference_server_is_away_is_told_apart_from_one_that_has_one(
    api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def statuses(key: str = api.key) -> dict[str, str]:
        return {one.name: one.status for one in check_api(tmp_path, f"{api.base_url}/v1", key)}

    async def is_away() -> None:
        raise UnavailableError("No inference server answers.")

    assert statuses() == {"api": "ok", "key": "ok", "inference": "ok"}
    monkeypatch.setattr(api.backend, "health", is_away)
    assert statuses() == {"api": "ok", "key": "ok", "inference": "fail"}
    assert statuses("lt_wrong") == {"api": "ok", "key": "fail"}
