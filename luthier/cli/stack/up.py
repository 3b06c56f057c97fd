"""`luthier up`: runs the whole service of one home in the foreground."""

import contextlib
import os
import shlex
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

from luthier.cli.stack.home import (
    CONNECTION_NAME,
    StackError,
    is_open_to_others,
    load_secrets,
    locked_home,
    run_folder,
    write_connection,
)
from luthier.cli.stack.plan import Plan, reachable_host, service_environment, service_plan
from luthier.cli.stack.postgres import open_postgres
from luthier.cli.stack.processes import ProcessSpec
from luthier.cli.stack.supervisor import Stopped, Supervisor
from luthier.cli.stack.valkey import open_valkey
from luthier.core.devices import find_device, format_bytes
from luthier.core.settings import Settings

MakePlan = Callable[..., Plan]


def say(line: str) -> None:
    """Print a line with the time of day, at once."""
    with contextlib.suppress(BrokenPipeError):
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def up(
    home: Path,
    *,
    host: str,
    port: int,
    settings: Settings,
    make_plan: MakePlan = service_plan,
) -> None:
    """Run the service of a home until INT or TERM. Main thread only.

    Args:
        make_plan: returns the processes to run; tests pass their own.

    Raises:
        StackError: when the service can't start; says what to do.
    """
    started_at = time.monotonic()
    # Files and models are private, whatever the umask of the caller.
    os.umask(0o077)
    with locked_home(home), run_folder(home) as run:
        _check_port(host, port)
        logs = home / "logs"
        logs.mkdir(exist_ok=True, mode=0o700)
        say(f"Home: {home}")
        if is_open_to_others(home):
            say(f"Warning: other users of this machine can enter {home}: `chmod 700 {home}` keeps them out")
        _say_memory(settings)
        supervisor = Supervisor(logs, say=say)
        with supervisor.signals():
            try:
                key = _start(
                    supervisor, home, run, host=host, port=port, settings=settings, make_plan=make_plan
                )
                seconds = time.monotonic() - started_at
                _announce(home, host=host, port=port, api_key=key, seconds=seconds)
                supervisor.keep()
            except Stopped:
                pass
            finally:
                say("Stopping")
                supervisor.stop()
                say("Stopped")


def _start(
    supervisor: Supervisor,
    home: Path,
    run: Path,
    *,
    host: str,
    port: int,
    settings: Settings,
    make_plan: MakePlan,
) -> str:
    """Start everything, wait until it is ready, and return the first admin key."""
    secrets = load_secrets(home)
    servers: list[ProcessSpec] = []
    database_url = settings.database_url.get_secret_value()
    if "database_url" not in settings.model_fields_set:
        postgres = open_postgres(home, run, secrets, say=say, user_name=settings.database_user)
        database_url = postgres.url()
        servers.append(postgres.spec())
    redis_url = settings.redis_url.get_secret_value()
    if "redis_url" not in settings.model_fields_set:
        valkey = open_valkey(run)
        redis_url = valkey.url()
        servers.append(valkey.spec())
    environment = service_environment(
        settings, home=home, run=run, secrets=secrets, database_url=database_url, redis_url=redis_url
    )
    say("Starting " + (", ".join(spec.name for spec in servers) or "on the operator's database and broker"))
    supervisor.start(servers)
    _fetch_base(supervisor, settings, environment)
    plan = make_plan(environment, host=host, port=port)
    # The inference server takes longest to load and needs no database: it loads beside the rest.
    supervisor.start(plan.early)
    supervisor.wait_ready([spec.name for spec in servers])
    for step in plan.steps:
        say(f"Running {step.name}")
        supervisor.run_step(step)
    say("Starting " + ", ".join(spec.name for spec in (*plan.early, *plan.late)))
    supervisor.start(plan.late)
    supervisor.wait_ready()
    return settings.bootstrap_api_key.get_secret_value() or secrets.api_key


def _say_memory(settings: Settings) -> None:
    device = find_device(settings)
    if device is not None:
        say(
            f"Memory of {device.name}: {format_bytes(device.training_bytes)} for jobs and "
            f"{format_bytes(device.serving_bytes)} for serving "
            f"(LUTHIER_SERVING_MEMORY_SHARE={settings.serving_memory_share:g})"
        )


def _fetch_base(supervisor: Supervisor, settings: Settings, environment: dict[str, str]) -> None:
    """Fetch the base that is loaded at start when it is missing; the service also starts without it."""
    base_id = settings.preload_base
    if not base_id or (settings.bases_dir / base_id / "base.json").is_file():
        return
    say(f"Fetching the base model {base_id} (once)")
    command = (sys.executable, "-m", "luthier.cli.main", "bases", "fetch", base_id)
    try:
        supervisor.run_step(ProcessSpec("fetch", command, environment))
    except StackError as error:
        say(f"Warning: {error}")
        say(f"Starting without it; try `luthier bases fetch {base_id}` later.")
        environment["LUTHIER_PRELOAD_BASE"] = ""


def _check_port(host: str, port: int) -> None:
    """Refuse a port that is taken before anything is started."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise StackError(
            f"Port {port} on {host} can't be used: {error.strerror}. Choose another by --port, such as "
            f"`luthier up --port {port + 1}`."
        ) from error


def _announce(home: Path, *, host: str, port: int, api_key: str, seconds: float) -> None:
    base_url = f"http://{reachable_host(host)}:{port}/v1"
    write_connection(home, base_url=base_url, api_key=api_key)
    connection = shlex.quote(str(home / CONNECTION_NAME))
    say(f"Started in {seconds:.1f} s; base_url and api_key are in {connection}")
    # The key itself is not printed: standard output is often logged.
    read_key = f"""sed -n 's/.*"api_key": "\\(.*\\)".*/\\1/p' {connection}"""
    lines = [
        f"Ready: {base_url}",
        "Try it:",
        f'  curl -H "Authorization: Bearer $({read_key})" {base_url}/models',
    ]
    print("\n".join(lines), flush=True)
