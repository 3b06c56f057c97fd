"""Checks that need no service: Python, packages, device, memory, disk."""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from luthier.cli.doctor.finding import Finding
from luthier.cli.output import size

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
    has_bf16 = any(flag in _cpu_flags() for flag in ("amx_bf16", "avx512_bf16"))
    detail = f"CPU; bfloat16 in hardware: {'yes' if has_bf16 else 'no'}"
    if facts["build"] and Path("/proc/driver/nvidia").exists():
        return Finding(
            "device", "warn", detail, "a GPU driver is there but torch sees no GPU: see `nvidia-smi`"
        )
    return Finding("device", "ok", detail)


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())


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
