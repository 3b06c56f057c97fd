"""Luthier's runner in plain torch, in process, where its compiled kernels would serve. See _serving.py."""

from pathlib import Path

import torch
from _serving import serve

from luthier.core.shapes import read_shape
from luthier.inference.runners.paged import PagedRunner
from luthier.methods import method_of_artifact
from luthier.modeling.load import load_base
from luthier.modeling.protocols import AdapterSource, ScheduledBatch, TokenChunk


def _load(order: dict) -> dict:
    torch.set_num_threads(order["num_threads"])
    base, num_rows = Path(order["base"]), order["max_rows"]
    runner = PagedRunner(
        load_base(base, dtype=torch.bfloat16, device="cpu"),
        max_cache_tokens=num_rows * order["max_length"],
        max_sequences=num_rows,
    )
    infos, shape = {}, read_shape(base)
    for one in order["models"]:
        folder = Path(one["folder"])
        source = AdapterSource(folder, method_of_artifact(folder).read_parts(folder, shape))
        infos[one["name"]] = runner.add_adapter(source)
    width = -(-order["max_length"] // runner.limits.block_size)

    def choose(chunks: list) -> list[list[int]]:
        return [[token] for token in runner.execute(ScheduledBatch(chunks)).greedy()]

    def run(prompts, models, num_new):
        streams = []
        for place, (prompt, name) in enumerate(zip(prompts, models, strict=True)):
            num_virtual = infos[name].num_virtual_tokens if name else 0
            adapter = infos[name].adapter if name else None
            table = range(place * width, (place + 1) * width)
            streams.append(([*range(-1, -1 - num_virtual, -1), *prompt], adapter, table))
        last: list[list[int]] = []
        # As many prompts in a pass as the scheduler would take.
        step = max(1, runner.limits.max_prefill_tokens // len(prompts[0]))
        for first in range(0, len(streams), step):
            part = streams[first : first + step]
            last += choose([TokenChunk(ids, 0, table, one, len(ids) - 1) for ids, one, table in part])
        found = [list(tokens) for tokens in last]
        for number in range(num_new - 1):
            pairs = zip(last, streams, strict=True)
            last = choose(
                [TokenChunk(tokens, len(ids) + number, table, one, 0) for tokens, (ids, one, table) in pairs]
            )
            for tokens, new in zip(found, last, strict=True):
                tokens.extend(new)
        return {"tokens": found}

    return {"run": run}


serve(_load)
