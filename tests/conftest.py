"""Real parts for tests: an embedded PostgreSQL with a fresh database per test, a catalogue with a tiny base,
an API served over HTTP. What a test starts, it stops."""

import asyncio
import gc
import inspect
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import hypothesis
import openai
import psycopg
import pytest
import uvicorn

# The collection of tests makes millions of objects, of which hardly any is garbage.
gc.disable()
# Before anything imports a hub client or a maths library.
os.environ["HF_HUB_OFFLINE"] = "1"
for _name in [name for name in os.environ if name.startswith("LUTHIER_")]:
    del os.environ[_name]

from api.deps import AppState  # noqa: E402
from api.main import create_app  # noqa: E402
from api.metrics import ApiMetrics, UsageRecorder  # noqa: E402
from api.streaming.event_hub import EventHub  # noqa: E402
from db.migrate import upgrade  # noqa: E402
from db.session import Database  # noqa: E402
from luthier.bases.catalogue import load_catalogue  # noqa: E402
from luthier.cli.stack.home import load_secrets  # noqa: E402
from luthier.cli.stack.postgres import open_postgres  # noqa: E402
from luthier.cli.stack.processes import ProcessSpec, spawn  # noqa: E402
from luthier.core.ids import new_api_key  # noqa: E402
from luthier.core.inference import ModelTarget  # noqa: E402
from luthier.core.settings import Settings  # noqa: E402
from luthier.serving.base import Health, Reply  # noqa: E402
from luthier.storage.store import Storage  # noqa: E402
from luthier.webhooks.sealing import Sealer, new_secret_key  # noqa: E402
from services.bootstrap import ensure_first_rows  # noqa: E402
from tests.folders import TEMPORARY_FOLDER, use_temporary_folder  # noqa: E402
from tests.tiny import BASE_ID, build_tiny_base  # noqa: E402
from tests.waiting import wait_until  # noqa: E402

# Tests judge what is done, never how fast: the machine may be busy.
hypothesis.settings.register_profile("luthier", deadline=None)
hypothesis.settings.load_profile("luthier")
# A client's default of five seconds would.
inspect.signature(httpx2.get).parameters["timeout"].default.read = 60.0

use_temporary_folder()

TINY_BASE = BASE_ID


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave the tests of benchmarks and examples, which guard no product code, to `make test-full`."""
    for item in items:
        if item.path.parent.name in {"benchmarks", "examples"}:
            item.add_marker(pytest.mark.full)


def pytest_collection_finish() -> None:
    """Collect garbage again, and look no more at what the collection of tests has made."""
    gc.collect()
    gc.freeze()
    gc.enable()


@dataclass
class Server:
    """An embedded PostgreSQL of the tests."""

    owner_url: str
    socket_folder: Path
    spec: ProcessSpec
    log_path: Path
    process: "subprocess.Popen[bytes] | None" = None

    def start(self) -> None:
        """Start it, and wait until it answers."""
        self.process = spawn(
            # Databases come and go with every test; no test pulls the plug of the machine.
            tuple("fsync=off" if part == "fsync=on" else part for part in self.spec.command),
            environment=self.spec.environment,
            log_path=self.log_path,
            user=self.spec.user,
            folder=self.spec.folder,
            death_signal=self.spec.death_signal,
        )
        wait_until(self.spec.is_ready, what="PostgreSQL answers")

    def stop(self, number: int | None = None) -> None:
        """Stop it, in order or by a signal of a test's choice."""
        self.process.send_signal(self.spec.stop_signal if number is None else number)
        self.process.wait(timeout=30)

    def url(self, name: str) -> str:
        """Return SQLAlchemy's URL of one of its databases."""
        return self.owner_url.replace("postgresql://", "postgresql+psycopg://").replace(
            "/postgres?", f"/{name}?"
        )

    def execute(self, statement: str) -> None:
        """Run a statement as the server's owner."""
        with psycopg.connect(self.owner_url, autocommit=True) as connection:
            connection.execute(statement.encode())


@contextmanager
def running_postgres() -> Iterator[Server]:
    """A real PostgreSQL with a migrated template database, stopped at the end."""
    # Not pytest's own folder: its path is too long for a socket, and another user can't enter it.
    folder = Path(tempfile.mkdtemp(prefix="lt-", dir=TEMPORARY_FOLDER))
    folder.chmod(0o755)
    before = os.environ.get("STATE_DIRECTORY")
    os.environ["STATE_DIRECTORY"] = str(folder / "state")
    secrets = load_secrets(folder)
    postgres = open_postgres(folder, folder, secrets, say=lambda _line: None)
    url = f"postgresql://postgres:{secrets.postgres_password}@/postgres?host={postgres.socket_folder}"
    server = Server(url, postgres.socket_folder, postgres.spec(), folder / "postgres.log")
    postgres.prepare()
    server.start()
    try:
        server.execute("CREATE DATABASE template_luthier")
        database = Database(server.url("template_luthier"), pool_size=1, answer_seconds=None)
        upgrade(database)
        database.close()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)
        if before is None:
            del os.environ["STATE_DIRECTORY"]
        else:
            os.environ["STATE_DIRECTORY"] = before


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """The test session's PostgreSQL."""
    with running_postgres() as server:
        yield server


@contextmanager
def fresh_database(postgres: Server) -> Iterator[Database]:
    """Hold a fresh, migrated database."""
    name = f"t{time.monotonic_ns()}"
    postgres.execute(f"CREATE DATABASE {name} TEMPLATE template_luthier STRATEGY FILE_COPY")
    # A machine that is busy with tests may answer slowly.
    opened = Database(postgres.url(name), pool_size=24, answer_seconds=30)
    try:
        yield opened
    finally:
        opened.close()
        postgres.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def database(postgres: Server) -> Iterator[Database]:
    """A fresh, migrated database."""
    with fresh_database(postgres) as opened:
        yield opened


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bases folder that holds the tiny base under its id."""
    folder = tmp_path_factory.mktemp("bases")
    build_tiny_base(folder / TINY_BASE)
    return folder


@pytest.fixture(scope="session")
def base(tiny_base: Path) -> Path:
    """The tiny base, to be read only."""
    return tiny_base / TINY_BASE


@pytest.fixture
def settings(database: Database, tiny_base: Path, tmp_path: Path) -> Settings:
    """Settings over the fresh database, with a catalogue whose only base is the tiny one."""
    return make_settings(database, tiny_base, tmp_path)


def make_settings(database: Database, tiny_base: Path, tmp_path: Path) -> Settings:
    """Return settings over a database, with a catalogue whose only base is the tiny one."""
    models_file = tmp_path / "models.toml"
    models_file.write_text(
        f'[bases.{TINY_BASE}]\nsource = "path:{tiny_base / TINY_BASE}"\nlicence = "Apache-2.0"\n'
        f'context_length = 256\nmemory_gib = 0.1\n[aliases]\n"gpt-4o-mini-2024-07-18" = "{TINY_BASE}"\n'
    )
    return Settings(
        _env_file=None,
        database_url=database.engine.url.render_as_string(hide_password=False),
        storage_url=f"file://{tmp_path}/objects",
        bases_dir=tiny_base,
        models_file=models_file,
        runs_dir=tmp_path / "runs",
        cache_dir=tmp_path / "cache",
        device="cpu",
        num_threads=1,
        bootstrap_api_key=new_api_key(),
        secret_key=new_secret_key(),
        lease_seconds=3,
        heartbeat_seconds=0.5,
        control_seconds=0.2,
        sweep_seconds=0.5,
        warm_spare_seconds=0,
    )


@dataclass
class FakeBackend:
    """An inference server that remembers what it was asked and answers the same every time."""

    asked: list[tuple[str, bytes, ModelTarget]] = field(default_factory=list)
    status: int = 200
    room_bytes: dict[str, int] = field(default_factory=dict)
    answer: bytes = b'{"object": "chat.completion", "choices": []}'

    async def complete(self, path: str, body: bytes, target: ModelTarget) -> Reply:
        self.asked.append((path, body, target))
        return Reply(self.status, {"content-type": "application/json"}, self.answer)

    async def health(self) -> Health:
        return Health(
            is_ready=True, holds=frozenset(), num_running=0, num_waiting=0, room_bytes=self.room_bytes
        )

    async def aclose(self) -> None:
        pass


@dataclass
class ProjectClient:
    """Plain HTTP requests with a project's key; a path is what follows /v1."""

    http: httpx2.Client
    key: str
    # Of other projects only.
    project_id: str = ""

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"}

    def ask(self, method: str, path: str, body: Any = None, **options: Any) -> httpx2.Response:
        headers = self.headers | options.pop("headers", {})
        return self.http.request(method, f"/v1{path}", json=body, headers=headers, **options)

    def ok(self, method: str, path: str, body: Any = None, **options: Any) -> dict[str, Any]:
        """Return the body of an answer that must be 200."""
        answer = self.ask(method, path, body, **options)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def refused(
        self, method: str, path: str, body: Any = None, **options: Any
    ) -> tuple[int, str, str | None, str]:
        """Return status, code, field and message of an answer that must be an error."""
        answer = self.ask(method, path, body, **options)
        assert answer.status_code >= 400, answer.text
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return answer.status_code, error["code"], error["param"], error["message"]

    def client(self, key: str | None = None, *, is_strict: bool = True) -> openai.OpenAI:
        """Return the SDK, which repeats nothing; a strict one refuses what its own types do not describe."""
        return openai.OpenAI(
            base_url=f"{self.http.base_url}/v1",
            api_key=key or self.key,
            max_retries=0,
            _strict_response_validation=is_strict,
        )

    def make_key(self, project: str = "other") -> dict[str, Any]:
        """Make a key of another project, or of this one."""
        return self.ok("POST", "/keys", {"name": project, "project": project})

    def upload(self, content: bytes, name: str = "rows.jsonl", **options: Any) -> httpx2.Response:
        """Upload a training file."""
        form = {"purpose": (None, "fine-tune"), "file": (name, content)}
        return self.ask("POST", "/files", files=form, **options)

    def upload_file(self, content: bytes) -> str:
        """Upload a training file that is accepted, and return its id."""
        answer = self.upload(content)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def create_job(self, file_id: str, **body: Any) -> dict[str, Any]:
        return self.ok("POST", "/fine_tuning/jobs", {"model": TINY_BASE, "training_file": file_id} | body)

    def other_project(self, name: str = "other") -> "ProjectClient":
        """Speak as another project, with a new key of it."""
        made = self.make_key(name)
        return ProjectClient(self.http, made["key"], made["project_id"])


@dataclass(kw_only=True)
class Api(ProjectClient):
    """A served API and what is behind it."""

    base_url: str
    state: AppState
    backend: FakeBackend
    notified: list[str] = field(default_factory=list)

    def stored_objects(self) -> list[str]:
        """Return the names of all objects in storage, without their prefixes, sorted."""
        root = self.state.storage.local_root
        return sorted(path.name for path in root.rglob("*") if path.is_file())


@pytest.fixture
def api(request: pytest.FixtureRequest) -> Iterator[Api]:
    """The API over HTTP with real PostgreSQL and storage; a fake inference server, recorded notifications.

    A module marked `shared_api` has one for all its tests, of which each finds the recordings empty.
    """
    if request.node.get_closest_marker("shared_api"):
        shared: Api = request.getfixturevalue("module_api")
        shared.notified.clear()
        shared.backend.asked.clear()
        yield shared
        return
    with serve_api(request.getfixturevalue("settings"), request.getfixturevalue("database")) as served:
        yield served


@pytest.fixture(scope="module")
def module_api(postgres: Server, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    with fresh_database(postgres) as database:
        settings = make_settings(database, tiny_base, tmp_path_factory.mktemp("module"))
        with serve_api(settings, database) as served:
            yield served


class _Server(uvicorn.Server):
    """A server that stops within milliseconds when it is asked to: each test starts and stops one."""

    async def main_loop(self) -> None:
        """Serve until it is asked to stop."""
        while not await self.on_tick(0):
            await asyncio.sleep(0.01)


@contextmanager
def serve_api(settings: Settings, database: Database) -> Iterator[Api]:
    """Serve the API over HTTP with real PostgreSQL and storage; the inference server is a fake."""
    with database.transaction() as session:
        ensure_first_rows(session, settings)
    notified: list[str] = []
    backend = FakeBackend()
    url = settings.database_url.get_secret_value()
    catalogue = load_catalogue(settings.models_file)
    state = AppState(
        settings=settings,
        database=database,
        storage=Storage.open(settings.storage_url),
        catalogue=catalogue,
        usage=UsageRecorder(database),
        metrics=ApiMetrics(database, lease_seconds=settings.lease_seconds),
        backend=backend,
        hub=EventHub(url),
        notify=notified.append,
        sealer=Sealer(settings.secret_key.get_secret_value()),
    )
    server = _Server(uvicorn.Config(create_app(state), port=0, log_config=None, timeout_graceful_shutdown=2))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started, what="the API serves")
        port = server.servers[0].sockets[0].getsockname()[1]
        key, base_url = settings.bootstrap_api_key.get_secret_value(), f"http://127.0.0.1:{port}"
        # A connection that was idle as long as the server keeps it may close under a request.
        with httpx2.Client(base_url=base_url, limits=httpx2.Limits(keepalive_expiry=1.0)) as http:
            yield Api(http, key, base_url=base_url, state=state, backend=backend, notified=notified)
    finally:
        server.should_exit = True
        thread.join(timeout=15)
    assert not thread.is_alive(), "the API did not stop"
