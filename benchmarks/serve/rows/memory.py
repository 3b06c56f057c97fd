"""One base however many adapters: what each one in memory takes beside its file."""

import gc
from typing import Any

from benchmarks.serve.bench import Bench
from benchmarks.serve.engine import our_server
from benchmarks.serve.figures import slope

NAME = "memory"
_COUNTS = (1, 2, 4, 8, 12, 16)


def measure_memory(bench: Bench) -> dict[str, Any]:
    """Read the server's memory while more and more LoRA models are in use.

    Args:
        bench: the run.

    Returns:
        Resident bytes by number of models, and the `summary`.
    """
    print(f"\nMemory of one base and its adapters ({NAME})", flush=True)
    models = bench.models("lora", max(_COUNTS))
    points: list[dict[str, int]] = []
    with our_server(bench.place, bench.client, NAME) as server:

        def read(count: int) -> None:
            gc.collect()
            points.append({"models": count, "resident_bytes": server.process.status_bytes("VmRSS")})

        read(0)
        for count in _COUNTS:
            prompts = bench.prompts.take(count, num_tokens=bench.options.prompt_tokens)
            requests = [
                server.request(model, prompt, num_new=4)
                for model, prompt in zip(models[:count], prompts, strict=True)
            ]
            errors = [one["error"] for one in server.send(requests)["answers"] if one["error"] is not None]
            if errors:
                raise SystemExit(f"A request failed: {errors[0]}")
            read(count)
    loaded = points[1:]
    base_bytes = sum(path.stat().st_size for path in bench.base.glob("*.safetensors"))
    grown = loaded[-1]["resident_bytes"] - points[0]["resident_bytes"]
    each = slope([one["models"] for one in loaded], [one["resident_bytes"] for one in loaded])
    found = {
        "points": points,
        "summary": {
            "bytes_of_base_alone": points[0]["resident_bytes"],
            "bytes_of_base_file": base_bytes,
            "bytes_each": each,
            "bytes_each_of_all_growth": grown / loaded[-1]["models"],
            "bytes_of_file": models[0].num_bytes,
            # The file holds float32; a server that keeps bf16 needs half of it.
            "times_of_file": each / models[0].num_bytes,
            "grown_bytes": grown,
        },
    }
    print(f"  {found['summary']}", flush=True)
    bench.keep(NAME, found)
    return found
