"""`luthier doctor`: checks of this machine and of the service, each with what to do about its fault."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from luthier.bases.catalogue import base_folder, find_base_facts, load_catalogue
from luthier.cli.connection import find_connection
from luthier.cli.output import print_json, printable, size
from luthier.cli.settings import SettingsError, read_settings
from luthier.cli.stack.home import (
    RUN_LINK_NAME,
    StackError,
    find_lock_holder,
    is_open_to_others,
    load_secrets,
)
from luthier.cli.stack.postgres import database_url
from luthier.cli.stack.postgres_programs import state_root
from luthier.cli.stack.valkey import SOCKET_NAME, answers_ping
from luthier.client import ApiError, LuthierClient, NotRunningError
from luthier.core.devices import NVIDIA_DRIVER, cpu_multiplies_bf16
from luthier.core.errors import LuthierError
from luthier.core.settings import Settings
from luthier.storage.manifests import verify_folder
from luthier.storage.store import Storage

_MARKS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}
_START_ADVICE = "start it with `luthier up`"
_GIB = 1024**3
_PROBE_SECONDS = 60.0
# Runs in a separate process: the command line does not import torch.
_DEVICE_PROBE = """
import json, torch
cuda = torch.cuda.is_available()
devices = []
for i in range(torch.cuda.device_count() if cuda else 0):
    p = torch.cuda.get_device_properties(i)
    devices.append({"name": p.name, "bytes": p.total_memory})
print(json.dumps({"build": torch.version.cuda, "devices": devices,
                  "bf16": torch.cuda.is_bf16_supported(including_emulation=False) if cuda else None}))
"""
_WORKERS = """
SELECT hostname, quarantine_reason, coalesce(extract(epoch FROM quarantined_until - now()), 0)::int
FROM workers WHERE heartbeat_at > now() - interval '30 seconds' ORDER BY hostname, id
"""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check; `advice` says what to do and is empty when all is well."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    advice: str = ""


def _not_running(name: str) -> Finding:
    """Return the finding of a check that needs the running service."""
    return Finding(name, "warn", "not running", _START_ADVICE)


def run_doctor(home: Path, *, base_url: str | None, api_key: str | None, as_json: bool) -> int:
    """Run every check, print its finding, and return the exit code: 1 when one failed."""
    findings = []
    for finding in _findings(home, base_url, api_key):
        findings.append(finding)
        if not as_json:
            print(f"{_MARKS[finding.status]}  {finding.name}: {printable(finding.detail)}", flush=True)
            if finding.advice:
                print(f"      -> {finding.advice}")
    if as_json:
        print_json([asdict(finding) for finding in findings])
    return 1 if any(finding.status == "fail" for finding in findings) else 0


def _findings(home: Path, base_url: str | None, api_key: str | None) -> Iterator[Finding]:
    yield check_python()
    yield check_packages()
    yield from _guarded("device", lambda: [check_device()])
    yield check_memory()
    yield check_disk(home)
    try:
        settings = read_settings()
    except SettingsError as error:
        yield Finding("settings", "fail", error.message, "correct the environment or .env")
        return
    yield check_home(home)
    yield from check_mode(home)
    yield from check_left_databases()
    yield from _guarded("database", lambda: check_database(home, settings))
    yield check_broker(home, settings)
    yield check_storage(home, settings)
    yield from check_bases(settings)
    yield from check_api(home, base_url, api_key)


def _guarded(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return check()
    except (OSError, ValueError, StackError, subprocess.TimeoutExpired) as error:
        return [Finding(name, "fail", f"{type(error).__name__}: {error}", "see the message")]


def check_python() -> Finding:
    """Which Python runs; the project does not install on one older than 3.11."""
    return Finding("python", "ok", f"{platform.python_version()} ({sys.executable})")


def check_packages() -> Finding:
    """Every requirement of the project, with the extras that training needs, is met."""
    from packaging.requirements import Requirement

    faults = []
    shown = []
    for text in importlib.metadata.requires("luthier") or []:
        requirement = Requirement(text)
        is_wanted = requirement.marker is None or requirement.marker.evaluate({"extra": "torch"})
        if not is_wanted:
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            faults.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            faults.append(f"{requirement.name} {version} is not {requirement.specifier}")
        if requirement.name in {"torch", "transformers", "peft"}:
            shown.append(f"{requirement.name} {version}")
    if faults:
        return Finding("packages", "fail", "; ".join(faults), "run `make setup`")
    return Finding("packages", "ok", ", ".join(shown))


def check_device() -> Finding:
    """Which device trains and serves, and whether it computes in bfloat16."""
    result = subprocess.run(
        [sys.executable, "-c", _DEVICE_PROBE],
        capture_output=True,
        text=True,
        timeout=_PROBE_SECONDS,
        check=False,
    )
    if result.returncode != 0:
        reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
        return Finding("device", "fail", f"torch does not load: {reason[:200]}", "run `make setup`")
    facts = json.loads(result.stdout)
    if facts["devices"]:
        names = ", ".join(f"{d['name']} ({size(d['bytes'])})" for d in facts["devices"])
        return Finding("device", "ok", f"{names}; bfloat16: {'yes' if facts['bf16'] else 'no'}")
    detail = f"CPU; bfloat16 in hardware: {'yes' if cpu_multiplies_bf16() else 'no'}"
    if facts["build"] and NVIDIA_DRIVER.exists():
        return Finding(
            "device", "warn", detail, "a GPU driver is there but torch sees no GPU: see `nvidia-smi`"
        )
    return Finding("device", "ok", detail)


def check_memory() -> Finding:
    """Memory and cores are enough for the small base."""
    page = os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * page
    available = os.sysconf("SC_AVPHYS_PAGES") * page
    detail = f"{size(total)}, {size(available)} free; {len(os.sched_getaffinity(0))} cores"
    if total < 4 * _GIB:
        return Finding("memory", "warn", detail, "training the small base takes about 4 GiB")
    return Finding("memory", "ok", detail)


def check_disk(home: Path) -> Finding:
    """The disk that holds the home has room."""
    existing = next(path for path in (home, *home.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    detail = f"{size(free)} free under {existing}"
    if free < 1 * _GIB:
        return Finding("disk", "fail", detail, "free some space, or choose another --home")
    if free < 5 * _GIB:
        return Finding("disk", "warn", detail, "models and checkpoints may fill it soon")
    return Finding("disk", "ok", detail)


def check_home(home: Path) -> Finding:
    """Whether a service runs on the home."""
    holder = find_lock_holder(home)
    if holder is None:
        return Finding("service", "warn", f"not running on {home}", _START_ADVICE)
    return Finding("service", "ok", f"running on {home} (process {holder})")


def check_mode(home: Path) -> list[Finding]:
    """No other user of the machine can enter the home."""
    if not home.exists() or not is_open_to_others(home):
        return []
    return [Finding("home", "warn", f"other users can enter {home}", f"chmod 700 {home}")]


def check_left_databases() -> list[Finding]:
    """Databases that root keeps outside the homes belong to homes that are still there."""
    left = {
        path.parent: path.read_text().strip()
        for path in sorted(state_root().glob("*/home"))
        if os.access(path, os.R_OK) and not Path(path.read_text().strip()).exists()
    }
    if not left:
        return []
    named = ", ".join(f"{folder} (of {home})" for folder, home in left.items())
    # A home may be on an unmounted disk or in a container: no removal is proposed.
    advice = "mount the disk of a home that is still used; ask the owner of a home before its database goes"
    return [Finding("old databases", "warn", f"their homes are not found here: {named}", advice)]


def check_database(home: Path, settings: Settings) -> list[Finding]:
    """The database answers and holds the schema, and a worker is alive that may train."""
    import psycopg

    is_embedded = "database_url" not in settings.model_fields_set
    if is_embedded and find_lock_holder(home) is None:
        return [_not_running("database")]
    url = settings.database_url.get_secret_value()
    if is_embedded:
        try:
            secrets = load_secrets(home, only_reads=True)
        except StackError as error:
            return [Finding("database", "fail", error.message, "restore secrets.json from a backup")]
        url = database_url((home / RUN_LINK_NAME).resolve(), secrets)
    try:
        with psycopg.connect(url.replace("+psycopg", "", 1), connect_timeout=3) as connection:
            version = connection.info.server_version // 10000
            found = connection.execute("SELECT to_regclass('alembic_version')").fetchone()
            if found is None or found[0] is None:
                return [Finding("database", "fail", "no schema", "run `python -m db.migrate`")]
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
            workers = connection.execute(_WORKERS).fetchall()
    except psycopg.Error as error:
        reason = str(error).strip().splitlines()[0][:200]
        return [Finding("database", "fail", reason, "see HOME/logs/postgres.log, or LUTHIER_DATABASE_URL")]
    schema = row[0] if row else "empty"
    return [Finding("database", "ok", f"PostgreSQL {version}, schema {schema}"), *_check_workers(workers)]


def _check_workers(workers: list[tuple[str, str | None, int]]) -> list[Finding]:
    if not workers:
        return [Finding("workers", "warn", "none is alive, so jobs wait", "start one: `python -m worker`")]
    bad = [
        Finding(
            "worker",
            "fail",
            f"{hostname} claims nothing to train: {reason} (tested again in {max(seconds, 0)} s)",
            "mend what the reason names, such as the driver, the packages or the memory, and restart it",
        )
        for hostname, reason, seconds in workers
        if reason is not None
    ]
    return bad or [Finding("workers", "ok", f"{len(workers)} alive")]


def check_broker(home: Path, settings: Settings) -> Finding:
    """The broker answers PING."""
    advice = "jobs still start, a little later: workers also look into the database; see HOME/logs/valkey.log"
    if "redis_url" not in settings.model_fields_set:
        if find_lock_holder(home) is None:
            return _not_running("broker")
        if answers_ping((home / RUN_LINK_NAME).resolve() / SOCKET_NAME):
            return Finding("broker", "ok", "Valkey (embedded) answers")
        return Finding("broker", "warn", "Valkey (embedded) does not answer", advice)
    import redis

    url = settings.redis_url.get_secret_value().replace("redis+socket://", "unix://", 1)
    try:
        redis.Redis.from_url(url, socket_timeout=3, socket_connect_timeout=3).ping()
    except (redis.RedisError, ValueError) as error:
        return Finding("broker", "warn", f"no answer ({type(error).__name__})", advice)
    return Finding("broker", "ok", "answers")


def check_storage(home: Path, settings: Settings) -> Finding:
    """An object can be written, read back and deleted."""
    url = settings.storage_url
    if "storage_url" not in settings.model_fields_set:
        if not home.exists():
            return Finding("storage", "ok", f"will be made under {home} at the first start")
        url = (home / "objects").as_uri()
    key = f"doctor/{uuid.uuid4().hex}"
    probe = b"probe"
    # obstore raises many types, which all mean that storage does not work.
    try:
        storage = Storage.open(url)
        storage.put_bytes(key, probe)
        is_same = storage.objects.get(key).bytes() == probe
        storage.delete_prefix("doctor")
    except Exception as error:  # noqa: BLE001
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return Finding("storage", "fail", reason, "check LUTHIER_STORAGE_URL, its credentials and its rights")
    if not is_same:
        return Finding(
            "storage", "fail", f"{url} gives back other bytes than were written", "check the store"
        )
    return Finding("storage", "ok", f"{url}: written, read and deleted")


def check_bases(settings: Settings) -> list[Finding]:
    """The catalogue can be read, and every fetched base matches its digest."""
    try:
        catalogue = load_catalogue(settings.models_file)
    except LuthierError as error:
        return [
            Finding("catalogue", "fail", error.message, "correct models.toml, or set LUTHIER_MODELS_FILE")
        ]
    findings = [Finding("catalogue", "ok", f"{len(catalogue.bases)} bases in {settings.models_file}")]
    num_fetched = 0
    for base_id in catalogue.bases:
        if find_base_facts(settings.bases_dir, base_id) is None:
            continue
        num_fetched += 1
        try:
            manifest = verify_folder(base_folder(settings.bases_dir, base_id))
        except LuthierError as error:
            advice = (
                f"remove {base_folder(settings.bases_dir, base_id)} and run `luthier bases fetch {base_id}`"
            )
            findings.append(Finding(f"base {base_id}", "fail", error.message, advice))
            continue
        findings.append(Finding(f"base {base_id}", "ok", f"verified, {manifest.digest[:19]}…"))
    if num_fetched == 0:
        advice = f"run `luthier bases fetch {settings.preload_base or next(iter(catalogue.bases), 'ID')}`"
        findings.append(Finding("bases", "warn", f"none is fetched into {settings.bases_dir}", advice))
    return findings


def check_api(home: Path, base_url: str | None, api_key: str | None) -> list[Finding]:
    """The API answers, takes the key and reaches an inference server."""
    try:
        connection = find_connection(base_url, api_key, home if base_url is None else None)
        with LuthierClient(connection.base_url, connection.api_key) as client:
            models = client.list_models()
            can_answer = client.is_inference_ready()
    except NotRunningError as error:
        if base_url is None and find_lock_holder(home) is None:
            return [_not_running("api")]
        return [Finding("api", "fail", error.message, "see HOME/logs/api.log")]
    except ApiError as error:
        if error.status in {401, 403}:
            advice = "make a key with `luthier keys create`, or remove LUTHIER_API_KEY to use the home's"
            return [Finding("api", "ok", "answers"), Finding("key", "fail", error.message, advice)]
        return [Finding("api", "fail", f"answers {error.status}: {error.message}", "see HOME/logs/api.log")]
    except LuthierError:
        return [_not_running("api")]
    return [
        Finding("api", "ok", f"{connection.base_url} answers"),
        Finding("key", "ok", f"is valid and sees {len(models)} models"),
        Finding("inference", "ok", "a server is ready")
        if can_answer
        else Finding("inference", "fail", "no server is ready, so chats fail", "see HOME/logs/inference.log"),
    ]
