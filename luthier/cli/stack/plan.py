"""The processes of a home's service and their environments, as data. Starts nothing."""

import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import httpx2

from luthier.cli.stack.home import Secrets, StackError
from luthier.cli.stack.processes import ProcessSpec
from luthier.core.settings import Settings

# Secrets that the inference server does not need.
_NOT_FOR_INFERENCE = (
    "LUTHIER_DATABASE_URL",
    "LUTHIER_REDIS_URL",
    "LUTHIER_BOOTSTRAP_API_KEY",
    "LUTHIER_SECRET_KEY",
)


@dataclass(frozen=True)
class Plan:
    """What `luthier up` runs: `early` beside the steps, each of them to its end, and `late` after them."""

    early: tuple[ProcessSpec, ...]
    steps: tuple[ProcessSpec, ...]
    late: tuple[ProcessSpec, ...]


def service_environment(
    settings: Settings, *, home: Path, run: Path, secrets: Secrets, database_url: str, redis_url: str
) -> dict[str, str]:
    """Return the environment of the service's processes: ours, completed; all paths are absolute."""
    computed = {
        "storage_url": (home / "objects").as_uri(),
        "runs_dir": str(home / "runs"),
        "cache_dir": str(home / "cache"),
        "vllm_adapters_dir": str(home / "vllm"),
        "bootstrap_api_key": secrets.api_key,
        "secret_key": secrets.secret_key,
    }
    environment = dict(os.environ)
    for name, value in computed.items():
        if name not in settings.model_fields_set:
            environment[f"LUTHIER_{name.upper()}"] = value
    urls = _inference_urls(settings, run)
    environment["LUTHIER_INFERENCE_URL"] = ",".join(urls)
    environment["LUTHIER_INFERENCE_PROCESSES"] = str(len(urls))
    environment["LUTHIER_INFERENCE_BACKEND"] = settings.inference_backend
    # Ctrl-C ends everything within seconds.
    stop_seconds = settings.stop_seconds if "stop_seconds" in settings.model_fields_set else 5.0
    environment["LUTHIER_STOP_SECONDS"] = str(stop_seconds)
    environment["LUTHIER_HOME"] = str(home)
    environment["LUTHIER_DATABASE_URL"] = database_url
    environment["LUTHIER_REDIS_URL"] = redis_url
    environment["LUTHIER_LOG_LEVEL"] = settings.log_level
    # Logs are files: Python would buffer their lines.
    environment["PYTHONUNBUFFERED"] = "1"
    return environment


def service_plan(environment: dict[str, str], *, host: str, port: int) -> Plan:
    """Return the steps and processes of the service, without database and broker."""
    python = sys.executable
    inference_environment = {k: v for k, v in environment.items() if k not in _NOT_FOR_INFERENCE}
    # Only bootstrap needs the first key in plain text.
    running_environment = {k: v for k, v in environment.items() if k != "LUTHIER_BOOTSTRAP_API_KEY"}
    is_ours = environment["LUTHIER_INFERENCE_BACKEND"] == "engine"
    urls = environment["LUTHIER_INFERENCE_URL"].split(",") if is_ours else []
    return Plan(
        early=tuple(
            _inference(python, inference_environment, url, number) for number, url in enumerate(urls)
        ),
        steps=(
            ProcessSpec("migrate", (python, "-m", "db.migrate"), running_environment),
            ProcessSpec("bootstrap", (python, "-m", "services.bootstrap"), environment),
        ),
        late=(
            ProcessSpec(
                name="api",
                command=(python, "-m", "api", "--host", host, "--port", str(port)),
                environment=running_environment,
                is_ready=partial(answers, f"http://{reachable_host(host)}:{port}", "/readyz"),
                stop_stage=0,
                stop_seconds=6.0,
            ),
            ProcessSpec(
                name="worker",
                command=(python, "-m", "worker"),
                environment=running_environment,
                stop_stage=0,
                # The worker itself ends jobs that have not saved by then.
                stop_seconds=float(environment["LUTHIER_STOP_SECONDS"]) + 1.0,
            ),
        ),
    )


def _inference(python: str, environment: dict[str, str], url: str, number: int) -> ProcessSpec:
    return ProcessSpec(
        name="inference" if number == 0 else f"inference-{number + 1}",
        command=(python, "-m", "luthier.inference.server"),
        environment=environment | {"LUTHIER_INFERENCE_URL": url},
        is_ready=partial(answers, url, "/healthz", b'"ready": true', b'"ready":true'),
        stop_stage=1,
        stop_seconds=1.0,
    )


def _inference_urls(settings: Settings, run: Path) -> list[str]:
    """Return the operator's URLs of inference servers, else a socket of ours for each process."""
    count, is_set = settings.inference_processes, settings.model_fields_set
    if "inference_url" not in is_set and settings.inference_backend != "engine":
        raise StackError(
            f"LUTHIER_INFERENCE_BACKEND is {settings.inference_backend}, whose server `luthier up` does not "
            "start: set LUTHIER_INFERENCE_URL to where it listens."
        )
    if "inference_url" not in is_set:
        names = ["inference.sock", *(f"inference-{number}.sock" for number in range(2, count + 1))]
        return [f"unix://{run / name}" for name in names]
    urls = settings.inference_urls
    if "inference_processes" in is_set and len(urls) != count:
        raise StackError(
            f"LUTHIER_INFERENCE_URL names {len(urls)} servers and LUTHIER_INFERENCE_PROCESSES is {count}; "
            "unset one of them."
        )
    return urls


def reachable_host(host: str) -> str:
    """Return the address by which a client on this machine reaches a bound one."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)


def answers(url: str, path: str, *contents: bytes) -> bool:
    """Whether a GET answers 200 within a second, with one of `contents` in its body when any is given.

    Args:
        url: `http://host:port` or `unix:///path.sock`.
    """
    parts = urlsplit(url)
    socket_path = parts.path if parts.scheme == "unix" else None
    origin = url if socket_path is None else "http://localhost"
    transport = httpx2.HTTPTransport(uds=socket_path, verify=False)
    try:
        with httpx2.Client(transport=transport, timeout=1.0, trust_env=False) as client:
            response = client.get(origin + path)
    except httpx2.HTTPError:
        return False
    found = response.content
    return response.status_code == 200 and (not contents or any(content in found for content in contents))
