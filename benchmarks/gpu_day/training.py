"""LoRA on random rows: our training process, and each peer that is installed, on the same rows."""

from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_day.random_base import FIRST_TOKEN, NUM_TOKENS, Scale, lora_tuning, write_lora
from benchmarks.train.contestants import ENVIRONMENTS, Order, PeerFailedError, run_peer
from benchmarks.train.ours import OursFailedError, run_ours
from benchmarks.train.workload import Workload, learning_rates, make_spec, make_workload
from luthier.core.specs import BaseFacts
from luthier.data.prepare.prepared_rows import PreparedRows, join_rows

PEERS = {"trl": "trl_sft", "unsloth": "unsloth_sft"}
_SEED = 1


def make_rows(scale: Scale) -> PreparedRows:
    """Return random rows of half the largest length up to all of it, the last third supervised."""
    generator = np.random.default_rng(_SEED)
    tokens, supervised = [], []
    for _ in range(scale.num_steps * scale.batch_size):
        length = int(generator.integers(scale.row_tokens // 2, scale.row_tokens + 1))
        ids = generator.integers(FIRST_TOKEN, FIRST_TOKEN + NUM_TOKENS, length)
        tokens.append(ids.astype(np.int32))
        supervised.append(np.arange(length) >= 2 * length // 3)
    return join_rows(tokens, supervised, range(1, len(tokens) + 1))


def prepare(
    base: Path, facts: BaseFacts, scale: Scale, *, device: str, num_threads: int, scratch: Path
) -> Workload:
    """Write the rows for both sides, and return them."""
    return make_workload(
        make_rows(scale),
        facts,
        base,
        batch_size=scale.batch_size,
        seed=_SEED,
        num_threads=num_threads,
        device=device,
        scratch=scratch,
    )


def train_ours(workload: Workload, scratch: Path) -> dict[str, Any]:
    """Train by our process; return speed, memory, losses and the path that it took, or how it failed."""
    try:
        found = run_ours(scratch / "ours", workload, make_spec(workload, lora_tuning()))
    except OursFailedError as error:
        return {"failed": str(error)}
    return _figures(found, workload) | {"path": found["path"], "precision": found["precision"]}


def train_peer(name: str, workload: Workload, scratch: Path) -> dict[str, Any]:
    """Train by a peer from a first adapter with the same B of zeros; or say why it did not."""
    if not (ENVIRONMENTS / name / "installed").exists():
        return {"skipped": f"not installed; --install {name} does it"}
    spec = make_spec(workload, lora_tuning())
    start = scratch / "start"
    if not start.exists():
        write_lora(start, workload.base_folder, seed=_SEED, device="cpu", is_start=True)
    order = Order(
        environment=name,
        script=PEERS[name],
        options={"weights": "bfloat16", "autocast": True, "order": "ours"},
        tuning=lora_tuning(),
        workload=workload,
        start=start,
        learning_rates=learning_rates(spec, workload.num_steps),
        device=workload.device,
    )
    try:
        found = run_peer(order, scratch)
    except PeerFailedError as error:
        return {"failed": str(error)}
    return _figures(found, workload)


def _figures(found: dict[str, Any], workload: Workload) -> dict[str, Any]:
    return {
        "tokens_per_second": found["num_tokens"] / found["seconds"],
        "seconds": found["seconds"],
        "memory_bytes": found["memory_bytes"],
        "losses": found["losses"],
        "has_all_tokens": found["num_tokens"] == workload.rows.num_tokens,
        "versions": found["versions"],
    }
