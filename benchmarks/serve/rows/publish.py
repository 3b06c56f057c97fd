"""How soon a model answers that has just been trained: from its sealed folder to its first token."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.serve.artifacts import publish_twin
from benchmarks.serve.bench import Bench
from benchmarks.serve.engine import our_server
from benchmarks.serve.figures import percentile
from benchmarks.train.pairs import median_interval
from luthier.storage.store import Storage

NAME = "publish"
_ROUNDS_A_PAIR = 4


def measure_publish(bench: Bench) -> dict[str, Any]:
    """Publish LoRA models one after another, each asked at once.

    The row in the database that a worker writes in between is left out; it is a few milliseconds.

    Args:
        bench: the run.

    Returns:
        Seconds of every try and their `summary`.
    """
    print(f"\nFrom a trained LoRA model's folder to its first token ({NAME})", flush=True)
    model = bench.models("lora", 1)[0]
    storage = Storage.open(f"file://{bench.place.objects}")
    tries: list[dict[str, float]] = []
    with our_server(bench.place, bench.client, NAME) as server:
        # The first artifact of a process costs imports that no later one does.
        server.first_token_seconds(model, *bench.prompts.take(1, num_tokens=bench.options.prompt_tokens))
        for number in range(_ROUNDS_A_PAIR * bench.options.pairs):
            twin = publish_twin(model, number, bench.folder("to-publish"))
            (prompt,) = bench.prompts.take(1, num_tokens=bench.options.prompt_tokens)
            begin = time.perf_counter()
            storage.put_folder(Path(twin.folder), twin.prefix)
            published = time.perf_counter()
            first = server.first_token_seconds(twin, prompt)
            tries.append(
                {
                    "publish_seconds": published - begin,
                    "first_token_seconds": first,
                    "total_seconds": time.perf_counter() - begin,
                }
            )
    totals = [one["total_seconds"] for one in tries]
    summary = {key: percentile([one[key] for one in tries], 0.5) for key in tries[0]}
    found = {
        "tries": tries,
        "summary": summary
        | {
            "num_bytes": model.num_bytes,
            "total": asdict(median_interval(totals)),
            "p99": percentile(totals, 0.99),
        },
    }
    print(f"  {found['summary']}", flush=True)
    bench.keep(NAME, found)
    return found
