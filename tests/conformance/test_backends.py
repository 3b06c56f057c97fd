"""What every backend promises, tested by its file being there."""

import asyncio
from pathlib import Path

import pytest

from luthier.core.errors import LuthierError, UnavailableError
from luthier.core.inference import ModelTarget
from luthier.core.settings import Settings
from luthier.serving import list_backends, open_backend
from luthier.serving.base import NotAcceptedError

TARGET = ModelTarget(model="m", base_id="b", project_id="p")


def _settings(folder: Path) -> Settings:
    return Settings(_env_file=None, storage_url=f"file://{folder}/objects", vllm_adapters_dir=folder / "vllm")


@pytest.mark.parametrize("name", list_backends())
def test_a_server_that_is_not_there_never_got_the_request(name: str, tmp_path: Path) -> None:
    async def run() -> None:
        # The port of the discard service, which no machine offers.
        backend = open_backend(name, "http://127.0.0.1:9", "token", _settings(tmp_path))
        with pytest.raises(NotAcceptedError):
            await backend.complete("/v1/completions", b'{"model": "m", "prompt": "a"}', TARGET)
        with pytest.raises(UnavailableError):
            await backend.health()
        await backend.aclose()

    asyncio.run(run())


def test_an_unknown_backend_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(LuthierError, match="engine, vllm"):
        open_backend("tgi", "http://127.0.0.1:9", "", _settings(tmp_path))
