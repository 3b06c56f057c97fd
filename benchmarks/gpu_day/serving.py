"""Greedy streams, each on a LoRA model of its own: our paged runner, and vLLM where it is installed."""

import json
import random
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_day.random_base import FIRST_TOKEN, NUM_TOKENS, Scale
from benchmarks.train.contestants import ENVIRONMENTS, SCRIPTS, quiet_environment
from luthier.core.shapes import read_shape
from luthier.inference.runners.paged import PagedRunner
from luthier.methods import discover
from luthier.modeling.load import load_base
from luthier.modeling.protocols import AdapterId, AdapterSource, ScheduledBatch, TokenChunk

_BLOCK_SIZE = 16
_MAX_SECONDS = 300.0
_SEED = 7


def make_prompts(scale: Scale, round_number: int) -> list[list[int]]:
    """Return random prompts of equal length, others in each round."""
    draw = random.Random(_SEED + round_number)
    return [
        [draw.randrange(FIRST_TOKEN, FIRST_TOKEN + NUM_TOKENS) for _ in range(scale.num_prompt_tokens)]
        for _ in range(scale.num_streams)
    ]


def serve_paged(base: Path, adapters: Sequence[Path], scale: Scale, device: str) -> dict[str, Any]:
    """Serve the streams on the adapters, and again on the bare base.

    Returns:
        Of both: tokens a second with the prompts and without, seconds to the first token; of the device: the
        peak of its memory.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model: Any = load_base(base, dtype=dtype, device=device)
    length = scale.num_prompt_tokens + scale.num_new_tokens
    blocks_each = -(-length // _BLOCK_SIZE)
    max_cache_tokens = scale.num_streams * blocks_each * _BLOCK_SIZE
    runner = PagedRunner(
        model, max_cache_tokens=max_cache_tokens, block_size=_BLOCK_SIZE, max_sequences=scale.num_streams
    )
    method, shape = discover()["lora"], read_shape(base)
    begin = time.perf_counter()
    held: list[AdapterId | None] = [
        runner.add_adapter(AdapterSource(folder, method.read_parts(folder, shape))).adapter
        for folder in adapters
    ]
    load_seconds = time.perf_counter() - begin
    found: dict[str, Any] = {"load_seconds_per_adapter": load_seconds / len(adapters)}
    for name, streams in (("lora", held), ("base", [None] * scale.num_streams)):
        # The first round warms up.
        for number in range(2):
            found[name] = _stream(runner, make_prompts(scale, number), streams, scale, blocks_each)
    if device == "cuda":
        found["memory_bytes"] = torch.cuda.max_memory_allocated()
    runner.close()
    return found


def _stream(
    runner: PagedRunner,
    prompts: list[list[int]],
    adapters: Sequence[AdapterId | None],
    scale: Scale,
    blocks_each: int,
) -> dict[str, Any]:
    tables = [range(number * blocks_each, (number + 1) * blocks_each) for number in range(len(prompts))]
    # As many prompts in a pass as the scheduler would take.
    num_together = max(1, runner.limits.max_prefill_tokens // scale.num_prompt_tokens)
    waiting: list[list[int]] = []
    begin = time.perf_counter()
    for first in range(0, len(prompts), num_together):
        places = range(first, min(first + num_together, len(prompts)))
        chunks = [
            TokenChunk(prompts[place], 0, tables[place], adapters[place], scale.num_prompt_tokens - 1)
            for place in places
        ]
        waiting += _choose(runner, chunks)
    first_token_seconds = time.perf_counter() - begin
    for position in range(scale.num_prompt_tokens, scale.num_prompt_tokens + scale.num_new_tokens - 1):
        chunks = [
            TokenChunk(tokens, position, table, adapter, 0)
            for tokens, table, adapter in zip(waiting, tables, adapters, strict=True)
        ]
        waiting = _choose(runner, chunks)
    seconds = time.perf_counter() - begin
    num_tokens = scale.num_new_tokens * len(prompts)
    return {
        "tokens_per_second": num_tokens / seconds,
        "decode_tokens_per_second": (num_tokens - len(prompts)) / (seconds - first_token_seconds),
        "first_token_seconds": first_token_seconds,
    }


def _choose(runner: PagedRunner, chunks: list[TokenChunk]) -> list[list[int]]:
    """Run chunks and return the likeliest next token of each."""
    tokens = runner.execute(ScheduledBatch(chunks)).greedy()
    if min(tokens) < 0:
        raise ArithmeticError("logits are not finite")
    return [[token] for token in tokens]


def serve_vllm(
    base: Path, adapters: Sequence[Path], scale: Scale, *, environment: str, num_threads: int, scratch: Path
) -> dict[str, Any]:
    """Serve the same streams by vLLM, in a process and environment of its own; or say why it did not."""
    if not (ENVIRONMENTS / environment / "installed").exists():
        return {"skipped": f"not installed; --install {environment} does it"}
    order = {
        "base": str(base),
        "models": [{"name": folder.name, "kind": "lora", "folder": str(folder)} for folder in adapters],
        "num_threads": num_threads,
        "max_rows": scale.num_streams,
        "max_length": scale.num_prompt_tokens + scale.num_new_tokens,
        "options": {"lora": True},
        "scratch": str(scratch),
    }
    path = scratch / "order-vllm.json"
    path.write_text(json.dumps(order))
    rounds = [
        {
            "prompts": make_prompts(scale, number),
            "models": [folder.name for folder in adapters],
            "num_new": scale.num_new_tokens,
        }
        for number in range(2)
    ]
    try:
        done = subprocess.run(
            [str(ENVIRONMENTS / environment / "bin" / "python"), str(SCRIPTS / "serve_vllm.py"), str(path)],
            input="".join(json.dumps(one) + "\n" for one in rounds),
            capture_output=True,
            text=True,
            check=False,
            env=quiet_environment(num_threads),
            timeout=_MAX_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"it did not end within {_MAX_SECONDS:.0f} s"}
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    faults = [answer["fault"] for answer in answers if "fault" in answer]
    if faults or len(answers) != len(rounds) + 1:
        return {"failed": faults[0] if faults else f"exit code {done.returncode}: {done.stderr[-300:]}"}
    last = answers[-1]
    num_tokens = sum(len(tokens) for tokens in last["tokens"])
    return {"lora": {"tokens_per_second": num_tokens / last["seconds"]}, "versions": answers[0]["versions"]}
