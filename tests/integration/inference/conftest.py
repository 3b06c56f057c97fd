"""The tiny base, random artifacts, and a served inference server; one of each per module."""

import asyncio
import errno
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest
import torch
import uvicorn

from luthier.core.inference import ModelTarget
from luthier.inference.engine.engine import Engine
from luthier.inference.models import artifact_cache
from luthier.inference.server.__main__ import open_socket
from luthier.inference.server.app import Service, build_app
from luthier.serving import open_backend
from tests.conftest import Api, fresh_database, serve_api, wait_until
from tests.conftest import Server as Postgres
from tests.conftest import make_settings as make_api_settings
from tests.inference_server import BARE, Served, StepGate, make_settings, publish
from tests.tiny import BASE_ID, build_tiny_base
from tests.tools_base import TOOLS_BASE_ID, open_tools_client
from tests.unit.inference.artifacts import build_artifact


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    # A socket's path has 107 bytes at most; pytest's own folders may be longer.
    with tempfile.TemporaryDirectory(prefix="lt-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def base_folder(folder: Path) -> Path:
    return build_tiny_base(folder / "bases" / BASE_ID)


@pytest.fixture(scope="module")
def artifacts(folder: Path, base_folder: Path) -> list[tuple[ModelTarget, Path]]:
    made = [folder / f"artifact{seed}" for seed in range(3)]
    for seed, path in enumerate(made):
        build_artifact(path, base_folder, seed=seed)
    return [(publish(folder, path, path.name, model=f"ft:tiny:{path.name}"), path) for path in made]


@pytest.fixture(scope="module")
def served(folder: Path, base_folder: Path) -> Iterator[Served]:
    torch.set_num_threads(1)
    settings = make_settings(folder)
    steps, engine = StepGate(), Engine(max_waiting=settings.max_waiting_requests)
    service = Service(settings, engine)
    listener = open_socket(settings.inference_url)
    server = uvicorn.Server(uvicorn.Config(build_app(service, settings, token=None), log_config=None))
    loop = asyncio.new_event_loop()
    thread = threading.Thread(
        target=lambda: loop.run_until_complete(server.serve(sockets=[listener])), daemon=True
    )
    engine.start()
    thread.start()
    transport = httpx2.HTTPTransport(uds=str(folder / "s.sock"))
    with (
        steps.watch(),
        httpx2.Client(transport=transport, base_url="http://inference", timeout=60) as client,
    ):
        wait_until(lambda: server.started, "the server's start")
        wait_until(lambda: client.get("/healthz").json()["ready"], "the base's load")
        yield Served(folder, base_folder, client, settings.inference_url, service, engine, steps, loop)
    steps.gate.set()
    server.should_exit = True
    thread.join(10)
    loop.close()
    engine.close()
    engine.join(10)


@pytest.fixture(scope="module")
def sdk(served: Served, folder: Path) -> Iterator[openai.OpenAI]:
    """The SDK as the API's client is to it: every request names the bare tiny base as its target."""
    transport = httpx2.HTTPTransport(uds=str(folder / "s.sock"))
    with openai.OpenAI(
        base_url="http://inference/v1",
        api_key="none",
        default_headers=BARE.to_headers(),
        http_client=httpx2.Client(transport=transport, timeout=60),
        max_retries=0,
        _strict_response_validation=True,
    ) as client:
        yield client


@pytest.fixture(scope="module")
def sdk_with_tools(sdk: openai.OpenAI, folder: Path) -> openai.OpenAI:
    """The SDK before the tiny base's twin that has tools."""
    return open_tools_client(sdk, folder / "bases")


@pytest.fixture(scope="module")
def chat_api(
    postgres: Postgres,
    served: Served,
    sdk_with_tools: openai.OpenAI,
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Api]:
    """The API before the real inference server, with the tiny base and its twin that has tools."""
    with fresh_database(postgres) as database:
        settings = make_api_settings(database, folder / "bases", tmp_path_factory.mktemp("chat"))
        models = settings.models_file.read_text()
        twin = models.replace("[bases.tiny-llama]", f"[bases.{TOOLS_BASE_ID}]").partition("[aliases]")[0]
        settings.models_file.write_text(twin + models)
        backend = open_backend("engine", served.url, "")
        with serve_api(settings, database) as api:
            api.backend.complete = backend.complete
            api.backend.aclose = backend.aclose
            yield api


@pytest.fixture
def _copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let artifacts be copied to the cache, as where they are published on another disk."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another disk")

    monkeypatch.setattr(artifact_cache, "_link_files", refuse)
