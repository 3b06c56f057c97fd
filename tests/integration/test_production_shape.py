"""docker-compose.yml without containers: commands, environments, health checks as plain processes.

Names of hosts, ports and folders are mapped to this machine's; everything else is taken as the file says.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import yaml

from luthier.cli.stack.processes import spawn
from luthier.cli.stack.valkey import open_valkey
from luthier.core.ids import new_api_key
from luthier.core.inference import HEADER_TOKEN
from luthier.webhooks.sealing import new_secret_key
from tests.conftest import Server, wait_until
from tests.folders import TEMPORARY_FOLDER
from tests.rows import colour_rows, jsonl
from tests.stack import free_port
from tests.tiny import BASE_ID, build_tiny_base

ROOT = Path(__file__).parents[2]
_COMPOSE = ROOT / "docker-compose.yml"
_SECRETS = {
    "POSTGRES_PASSWORD": "unused",
    "POSTGRES_SUPERUSER_PASSWORD": "of-the-superuser",
    "VALKEY_PASSWORD": "of-valkey",
    "LUTHIER_INTERNAL_TOKEN": "an-internal-token",
    "LUTHIER_BOOTSTRAP_API_KEY": new_api_key(),
    "LUTHIER_SECRET_KEY": new_secret_key(),
}
_VARIABLES = _SECRETS | {"LUTHIER_PRELOAD_BASE": BASE_ID, "LUTHIER_NUM_THREADS": "1"}
_MARK = re.compile(r"\$(?:(\$)|\{(\w+)(?:(:?[-?])([^}]*))?\})")


def interpolate(text: str, variables: Mapping[str, str]) -> str:
    """Replace compose's variables (Compose specification, "Interpolation"); a missing required one raises."""

    def value(match: re.Match[str]) -> str:
        dollar, name, operator, rest = match.groups()
        if dollar:
            return "$"
        given = variables.get(name)
        is_set = given is not None and (given != "" or not (operator or "").startswith(":"))
        if is_set:
            return str(given)
        if operator and operator.endswith("?"):
            raise KeyError(name)
        return rest if operator else ""

    return _MARK.sub(value, text)


def read_compose(variables: Mapping[str, str]) -> dict[str, Any]:
    """Return the services of docker-compose.yml, variables filled in."""

    def fill(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: fill(value) for key, value in node.items()}
        if isinstance(node, list):
            return [fill(value) for value in node]
        return interpolate(node, variables) if isinstance(node, str) else node

    return fill(yaml.safe_load(_COMPOSE.read_text()))["services"]


def _seconds(text: str) -> float:
    assert text.endswith("s")
    return float(text.removesuffix("s"))


@dataclass
class Shape:
    """The services of the file on this machine."""

    services: dict[str, Any]
    folder: Path
    renamed: dict[str, str]
    running: dict[str, "subprocess.Popen[bytes]"] = field(default_factory=dict)

    def localise(self, text: str) -> str:
        """Replace every name of the file's world in one pass, so that nothing is replaced twice."""
        names = "|".join(re.escape(name) for name in self.renamed)
        return re.sub(names, lambda match: self.renamed[match[0]], text)

    def environment(self, name: str) -> dict[str, str]:
        """Return all that a container would see, and nothing of the test's own settings."""
        declared = {
            key: self.localise(str(value)) for key, value in self.services[name]["environment"].items()
        }
        # Kernels that were compiled before are found again: a minute less than in a new container.
        caches = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        image = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "XDG_CACHE_HOME": caches,
            "OMP_NUM_THREADS": "1",
        }
        return image | {"LUTHIER_MODELS_FILE": str(self.folder / "models.toml")} | declared

    def command(self, words: list[str]) -> tuple[str, ...]:
        return tuple(sys.executable if word == "python" else self.localise(word) for word in words)

    def run_once(self, name: str) -> "subprocess.CompletedProcess[str]":
        words = [
            word.replace("exec python", f"exec {sys.executable}") for word in self.services[name]["command"]
        ]
        return subprocess.run(
            self.command(words),
            cwd=self.folder,
            env=self.environment(name),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def start(self, name: str) -> None:
        self.running[name] = spawn(
            self.command(self.services[name]["command"]),
            environment=self.environment(name),
            log_path=self.folder / f"{name}.log",
            folder=self.folder,
        )

    def is_healthy(self, name: str) -> bool:
        process = self.running[name]
        assert process.poll() is None, f"{name} ended: {self.log(name)}"
        kind, *words = self.services[name]["healthcheck"]["test"]
        assert kind == "CMD"
        check = subprocess.run(
            self.command(words), cwd=self.folder, env=self.environment(name), capture_output=True, check=False
        )
        return check.returncode == 0

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()[-2000:]

    def stop(self, name: str) -> int:
        """Stop a service as an engine does: TERM, and its grace period."""
        self.running[name].send_signal(signal.SIGTERM)
        grace_seconds = _seconds(self.services[name]["stop_grace_period"])
        return self.running[name].wait(timeout=grace_seconds)


@pytest.fixture(scope="module")
def shape(postgres: Server) -> Iterator[Shape]:
    """The whole shape, started in the order of the file's conditions."""
    folder = Path(tempfile.mkdtemp(prefix="lt-", dir=TEMPORARY_FOLDER))
    database = "production_shape"
    postgres.execute(f"CREATE DATABASE {database}")
    source = build_tiny_base(folder / "source" / BASE_ID)
    (folder / "models.toml").write_text(
        f'[bases.{BASE_ID}]\nsource = "path:{source}"\nlicence = "Apache-2.0"\n'
        "context_length = 256\nmemory_gib = 0.1\n"
    )
    for name in ("objects", "bases", "runs", "cache", "scratch"):
        (folder / "state" / name).mkdir(parents=True)
    valkey = open_valkey(folder)
    api_port, inference_port = str(free_port()), str(free_port())
    renamed = {
        "postgresql+psycopg://luthier:unused@postgres:5432/luthier": postgres.url(database),
        "redis://:of-valkey@redis:6379/0": valkey.url(),
        "/var/lib/luthier": str(folder / "state"),
        "deploy/health.py": str(ROOT / "deploy" / "health.py"),
        "http://inference:8001": f"http://127.0.0.1:{inference_port}",
        "http://0.0.0.0:8001": f"http://127.0.0.1:{inference_port}",
        "http://127.0.0.1:8001": f"http://127.0.0.1:{inference_port}",
        "http://127.0.0.1:8000": f"http://127.0.0.1:{api_port}",
        "0.0.0.0": "127.0.0.1",
        "8000": api_port,
    }
    made = Shape(read_compose(_VARIABLES), folder, renamed)
    spec = valkey.spec()
    broker = spawn(spec.command, environment=spec.environment, log_path=folder / "redis.log")
    try:
        wait_until(spec.is_ready, "the broker answers")
        yield made
    finally:
        for process in (*made.running.values(), broker):
            process.kill()
            process.wait()
        postgres.execute(f"DROP DATABASE {database} WITH (FORCE)")
        shutil.rmtree(folder)


def test_the_shape_starts_answers_trains_and_stops_as_the_file_says(shape: Shape) -> None:
    for name in ("fetch", "migrate", "bootstrap"):
        done = shape.run_once(name)
        assert done.returncode == 0, f"{name}: {done.stderr[-2000:]}"
    for name in ("inference", "api", "worker"):
        shape.start(name)
    for name in ("inference", "api", "worker"):
        wait_until(lambda name=name: shape.is_healthy(name), f"{name} is healthy: {shape.log(name)}")

    base_url, key = f"http://127.0.0.1:{shape.renamed['8000']}/v1", _VARIABLES["LUTHIER_BOOTSTRAP_API_KEY"]
    client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=0, timeout=60)
    chat: Any = {"model": BASE_ID, "messages": [{"role": "user", "content": "the sky"}], "max_tokens": 4}
    assert client.chat.completions.create(**chat).usage.completion_tokens >= 1
    _refuses_other_tokens(shape, chat)

    file = client.files.create(file=("rows.jsonl", jsonl(colour_rows(24))), purpose="fine-tune")
    long: Any = {"n_epochs": 20, "batch_size": 1}
    job_id = client.fine_tuning.jobs.create(model=BASE_ID, training_file=file.id, hyperparameters=long).id

    def status() -> str:
        return client.fine_tuning.jobs.retrieve(job_id).status

    wait_until(lambda: status() not in {"validating_files", "queued"}, "the worker has the job")
    # TERM in the middle of a job: the grace period is enough, and the job is not lost.
    assert shape.stop("worker") == 0, shape.log("worker")
    assert status() in {"queued", "succeeded"}, shape.log("worker")
    assert shape.stop("api") in {0, -signal.SIGTERM}, shape.log("api")
    assert shape.stop("inference") == 0, shape.log("inference")


def _refuses_other_tokens(shape: Shape, chat: dict[str, Any]) -> None:
    url = shape.environment("api")["LUTHIER_INFERENCE_URL"] + "/v1/chat/completions"
    for headers in ({}, {HEADER_TOKEN: "another-token"}):
        refused = httpx2.post(url, json=chat, headers=headers)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("name", _SECRETS)
def test_a_missing_secret_is_refused_before_anything_starts(name: str) -> None:
    for value in ({}, {name: ""}):
        with pytest.raises(KeyError, match=name):
            read_compose({k: v for k, v in _VARIABLES.items() if k != name} | value)


def test_secrets_reach_only_the_services_that_need_them() -> None:
    services = read_compose(_VARIABLES)
    holders: dict[str, set[str]] = {}
    for name, service in services.items():
        for variable in service.get("environment", {}):
            holders.setdefault(variable, set()).add(name)
    assert holders["LUTHIER_BOOTSTRAP_API_KEY"] == {"bootstrap"}
    servers = {"inference", "inference-gpu"}
    assert holders["LUTHIER_INTERNAL_TOKEN"] == {"api", "worker", "worker-gpu", *servers}
    assert holders["LUTHIER_SECRET_KEY"] == {"bootstrap", "api", "worker", "worker-gpu"}
    assert holders["LUTHIER_DATABASE_URL"] == {"migrate", "bootstrap", "api", "worker", "worker-gpu"}


def test_every_service_of_ours_is_hardened_and_only_the_api_is_published() -> None:
    for name, service in read_compose(_VARIABLES).items():
        if name in {"postgres", "redis"}:
            assert "ports" not in service
            continue
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert ("ports" in service) == (name == "api"), name


def test_the_services_role_is_no_superuser_and_its_passwords_stay_separate() -> None:
    services = read_compose(_VARIABLES)
    database = services["postgres"]
    superuser = database["environment"]["POSTGRES_USER"]
    url = services["api"]["environment"]["LUTHIER_DATABASE_URL"]
    assert f"//{superuser}:" not in url
    assert "of-the-superuser" not in str({name: one for name, one in services.items() if name != "postgres"})
    script = database["volumes"][0].split(":")[0]
    assert "NOSUPERUSER" in (ROOT / script).read_text()
    broker = services["redis"]
    assert broker["command"][-2:] == ["--requirepass", "of-valkey"]
    assert ":of-valkey@redis" in services["worker"]["environment"]["LUTHIER_REDIS_URL"]


def test_every_service_has_a_limit_of_processes_and_no_large_file_goes_to_memory() -> None:
    for name, service in read_compose(_VARIABLES).items():
        assert service["pids_limit"] > 0, name
        for mount in service.get("tmpfs", []):
            assert ":size=" in mount, name
        folder = service.get("environment", {}).get("TMPDIR", "/tmp")
        if name in {"api", "worker", "inference", "fetch"}:
            assert any(volume.split(":")[1] == folder for volume in service["volumes"]), name


def test_commands_and_health_checks_of_the_file_are_those_of_the_images() -> None:
    text = (ROOT / "Dockerfile").read_text()
    services = read_compose(_VARIABLES)
    for target in ("api", "worker", "inference"):
        stage = re.search(rf"^FROM \S+ AS {target}$(.*?)(?=^FROM |\Z)", text, re.MULTILINE | re.DOTALL)
        commands = [yaml.safe_load(words) for words in re.findall(r"CMD (\[.*\])", stage[1])]
        assert commands == [services[target]["healthcheck"]["test"][1:], services[target]["command"]]


def test_the_dockerfile_is_clean() -> None:
    found = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), ROOT / "Dockerfile"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("profile", [[], ["--profile", "gpu"]], ids=["default", "gpu"])
def test_the_compose_file_is_accepted_by_compose(profile: list[str]) -> None:
    program = shutil.which("docker-compose")
    if program is None:
        pytest.skip("docker-compose is not installed (Debian: apt install docker-compose)")
    found = subprocess.run(
        [program, "-f", str(_COMPOSE), "--env-file", "/dev/null", *profile, "config", "-q"],
        env={"PATH": os.environ["PATH"], **_VARIABLES},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
