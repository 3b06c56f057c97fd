"""Runs all checks and prints their findings."""

import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from luthier.cli.doctor import machine, service
from luthier.cli.doctor.finding import Finding
from luthier.cli.output import print_json, printable
from luthier.cli.settings import SettingsError, read_settings
from luthier.cli.stack.home import StackError

_MARKS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL"}


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
    yield machine.check_python()
    yield machine.check_packages()
    yield from _guarded("device", lambda: [machine.check_device()])
    yield machine.check_memory()
    yield machine.check_disk(home)
    try:
        settings = read_settings()
    except SettingsError as error:
        yield Finding("settings", "fail", error.message, "correct the environment or .env")
        return
    yield service.check_home(home)
    yield from service.check_mode(home)
    yield from service.check_left_databases()
    yield from _guarded("database", lambda: service.check_database(home, settings))
    yield service.check_broker(home, settings)
    yield service.check_storage(home, settings)
    yield from service.check_bases(settings)
    yield from service.check_api(home, base_url, api_key)


def _guarded(name: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return check()
    except (OSError, ValueError, StackError, subprocess.TimeoutExpired) as error:
        return [Finding(name, "fail", f"{type(error).__name__}: {error}", "see the message")]
