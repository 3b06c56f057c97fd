"""`make gpu-day`: correctness, training and serving of an 8B shape on one GPU; its JSON is the last output.

    python -m benchmarks.gpu_day [--scale 64] [--install trl] [--out FILE]

Without a GPU it runs at a sixty-fourth of the size on the CPU. Peers run where their environment is in
`.venv-peers`; `--install` makes it before the clock starts. After ten minutes it writes what it has.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.gpu_day import training
from benchmarks.gpu_day.random_base import SCALES, Scale, make_base, write_lora
from benchmarks.gpu_day.serving import serve_paged, serve_vllm
from benchmarks.machine import describe_machine
from benchmarks.results_file import ROOT
from benchmarks.train.contestants import PeerFailedError, ensure_environment

MAX_SECONDS = 600
RESULTS = ROOT / "benchmarks" / "results" / "gpu-day.json"
TRY_RESULTS = ROOT / ".work" / "gpu-day.json"
# vLLM's own wheel is for CUDA, the other one a community's for CPUs.
_VLLM = {"cuda": "vllm-cuda", "cpu": "vllm"}


class TimeUpError(Exception):
    """The ten minutes are over."""


def main() -> None:
    """Run all parts; exit code 1 when one of ours failed."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = _parse_options(device)
    for name in options.install:
        try:
            ensure_environment(name)
        except PeerFailedError as error:
            print(f"{name}: {error}", file=sys.stderr)
    signal.signal(signal.SIGALRM, _time_up)
    signal.alarm(MAX_SECONDS)
    found: dict[str, Any] = {"format": 1, "card": _card(device), "machine": describe_machine()}
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gpu-day-", dir=options.scratch) as scratch:
        try:
            _run(found, options, device, Path(scratch))
        except TimeUpError:
            found["is_complete"] = False
    found["seconds"] = time.perf_counter() - begin
    options.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1)
    options.out.write_text(text + "\n")
    print(text)
    if not _is_right(found):
        sys.exit(f"gpu-day: a part of ours failed or is missing; {options.out} says which.")


def _run(found: dict[str, Any], options: argparse.Namespace, device: str, scratch: Path) -> None:
    """Fill in one part after the other, so that what is done stands when the time is up."""
    scale, num_threads = SCALES[options.scale], options.threads
    base = scratch / f"random-8b-{options.scale}"
    found["scale"] = f"1/{options.scale}"

    def part(name: str, run: Callable[[], Any]) -> Any:
        print(f"gpu-day: {name}", file=sys.stderr, flush=True)
        begin = time.perf_counter()
        reported = run()
        found.setdefault("part_seconds", {})[name] = time.perf_counter() - begin
        return reported

    found["correctness"] = part(
        "correctness", lambda: _run_tests(options.tests, device, scratch / "tests.xml")
    )
    facts = part("base", lambda: make_base(base, scale, device))
    found["num_parameters"] = facts.num_parameters
    _empty(device)
    found["training"] = {}
    workload = training.prepare(base, facts, scale, device=device, num_threads=num_threads, scratch=scratch)
    found["training"]["ours"] = part("training", lambda: training.train_ours(workload, scratch))
    found["serving"] = {}
    adapters = part("adapters", lambda: _write_adapters(scratch, base, scale, device))
    found["serving"]["paged"] = part("serving", lambda: serve_paged(base, adapters, scale, device))
    _empty(device)
    for name in training.PEERS:
        found["training"][name] = part(name, lambda name=name: training.train_peer(name, workload, scratch))
    found["serving"]["vllm"] = part(
        "vllm",
        lambda: serve_vllm(
            base, adapters, scale, environment=_VLLM[device], num_threads=num_threads, scratch=scratch
        ),
    )
    found["is_complete"] = True


def _write_adapters(scratch: Path, base: Path, scale: Scale, device: str) -> list[Path]:
    return [
        write_lora(scratch / f"lora-{number}", base, seed=number, device=device)
        for number in range(scale.num_streams)
    ]


def _run_tests(path: str, device: str, report: Path) -> dict[str, int]:
    """Run the tests of a device; return how many tests passed, failed and were skipped."""
    marker = ["-m", "gpu"] if device == "cuda" else []
    subprocess.run(
        [sys.executable, "-m", "pytest", path, f"--junitxml={report}", *marker],
        cwd=ROOT,
        stdout=sys.stderr,
        check=False,
    )
    suite = ElementTree.parse(report).getroot()[0].attrib
    counts = {name: int(suite[name]) for name in ("tests", "failures", "errors", "skipped")}
    return counts | {"passed": counts["tests"] - sum(counts[n] for n in ("failures", "errors", "skipped"))}


def _is_right(found: dict[str, Any]) -> bool:
    tests = found.get("correctness", {})
    training_, serving = found.get("training", {}), found.get("serving", {})
    return (
        tests.get("passed", 0) > 0
        and tests["failures"] == tests["errors"] == 0
        and training_.get("ours", {}).get("has_all_tokens", False)
        and "lora" in serving.get("paged", {})
    )


def _card(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {"name": "CPU", "memory_gib": None}
    facts = torch.cuda.get_device_properties(0)
    return {"name": facts.name, "memory_gib": round(facts.total_memory / 1024**3, 1)}


def _empty(device: str) -> None:
    """Give the allocator's unused memory back to other processes."""
    if device == "cuda":
        torch.cuda.empty_cache()


def _parse_options(device: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_day")
    parser.add_argument("--scale", type=int, choices=SCALES, default=1 if device == "cuda" else 64)
    parser.add_argument("--install", action="append", default=[], choices=[*training.PEERS, *_VLLM.values()])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--tests", default="tests/gpu", help="what pytest runs (%(default)s)")
    parser.add_argument("--scratch", type=Path, default=None, help="a folder with room for 17 GB")
    parser.add_argument("--out", type=Path, default=None, help="where the JSON goes")
    options = parser.parse_args()
    options.out = options.out or (RESULTS if device == "cuda" and options.scale == 1 else TRY_RESULTS)
    return options


def _time_up(_number: int, _frame: FrameType | None) -> None:
    raise TimeUpError


if __name__ == "__main__":
    main()
