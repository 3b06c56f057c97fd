"""Serving beside peers: `make bench-serve`.

Each row serves the same new prompts on every side in turn, from the same base in bf16 with the same threads,
the most probable token at every step. benchmarks/README.md says how to read it.
"""

import argparse
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from benchmarks.results_file import ROOT, ResultsFile
from benchmarks.serve.artifacts import copy_without_end
from benchmarks.serve.bench import Bench
from benchmarks.serve.engine import Client, Place
from benchmarks.serve.plan import NUM_NEW_TOKENS, NUM_PAIRS, NUM_PROMPT_TOKENS, STREAM_ROWS
from benchmarks.serve.process import SideFailedError
from benchmarks.serve.prompts import Prompts
from benchmarks.serve.rows import alias, churn, front, memory, prefill, publish
from benchmarks.serve.rows.streams import measure_streams
from benchmarks.serve.table import make_table, serving_code
from benchmarks.train.workload import find_base
from luthier.core.settings import Settings
from luthier.data.rendering.tokenizer import Tokenizer

RESULTS = ROOT / "benchmarks" / "results" / "serve.json"
# Where tries go that are too short to be shown.
TRY_RESULTS = ROOT / ".work" / "bench-serve.json"
_TEXT = ROOT / "luthier" / "training" / "loop" / "general_text.txt"
_OTHER_ROWS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    churn.NAME: churn.measure_churn,
    publish.NAME: publish.measure_publish,
    prefill.NAME: prefill.measure_prefill,
    memory.NAME: memory.measure_memory,
    front.NAME: front.measure_front,
    alias.NAME: alias.measure_alias,
}


def main() -> None:
    """Measure what is asked for, print the table, write the results."""
    options = _parse()
    # A TERM ends the blocks in order, as Ctrl-C does: our processes and the peers' end with us.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    facts, fetched = find_base(options.base)
    results = ResultsFile(options.out, describe_machine(), fresh=options.fresh)
    # Short, for sockets; on a disk, for gigabytes of models.
    with tempfile.TemporaryDirectory(prefix="lt-serve-", dir="/var/tmp") as name:
        scratch = Path(name)
        client = Client(scratch / "client.log")
        place = Place(
            bases_dir=scratch / "bases",
            base_id=facts.id,
            objects=scratch / "objects",
            num_threads=options.threads,
            dtype=options.dtype,
            run_dir=scratch,
        )
        base = copy_without_end(fetched, place.bases_dir)
        tokenizer = Tokenizer.load(base)
        bench = Bench(
            options,
            base,
            place,
            client,
            tokenizer,
            Prompts(_TEXT.read_text(), tokenizer),
            results,
            scratch,
        )
        try:
            failed = [name for name in options.row if not _measure(name, bench)]
        finally:
            client.close()
            # Also when it is stopped: what was measured stands.
            results.save()
            table = make_table(results.content)
            options.out.with_suffix(".md").write_text(table)
            print(f"\n{table}\n{options.out} written", flush=True)
    if failed:
        raise SystemExit(f"Not measured: {', '.join(failed)}")


def _measure(name: str, bench: Bench) -> bool:
    """Measure one row; whether it came to its end. The other rows are measured all the same."""
    try:
        row = STREAM_ROWS.get(name)
        found = _OTHER_ROWS[name](bench) if row is None else measure_streams(row, bench)
    except SideFailedError as error:
        print(f"  {name} broke off: {error}", flush=True)
        bench.keep(name, {"failed": str(error), "code": serving_code()})
        return False
    bench.keep(name, found | {"code": serving_code()})
    return True


def _parse() -> argparse.Namespace:
    names = [*STREAM_ROWS, *_OTHER_ROWS]
    peers = sorted({one.name for row in STREAM_ROWS.values() for one in row.contests} | {churn.PEER.name})
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serve")
    parser.add_argument("--row", action="append", choices=names, metavar="ROW", help=", ".join(names))
    parser.add_argument("--peer", action="append", choices=peers, metavar="PEER", help=", ".join(peers))
    parser.add_argument("--pairs", type=int, default=NUM_PAIRS, help="rounds of a row (%(default)s)")
    parser.add_argument("--new-tokens", type=int, default=NUM_NEW_TOKENS, help="of a stream (%(default)s)")
    parser.add_argument("--prompt-tokens", type=int, default=NUM_PROMPT_TOKENS, help="(%(default)s)")
    parser.add_argument("--long-prompt-tokens", type=int, default=4000, help="of prefill (%(default)s)")
    parser.add_argument("--churn-models", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--registered", type=int, default=1000, help="of churn's growth (%(default)s)")
    parser.add_argument("--settings", type=int, default=10, help="tried of each peer, at most (%(default)s)")
    parser.add_argument("--base", default=Settings().preload_base)
    parser.add_argument("--threads", type=int, default=2, help="of every side (%(default)s)")
    parser.add_argument("--dtype", default="auto", help="of our server: auto, bfloat16 (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    parser.add_argument("--out", type=Path, default=None, help="results file")
    options = parser.parse_args()
    names_of_full = (
        "pairs",
        "new_tokens",
        "prompt_tokens",
        "long_prompt_tokens",
        "churn_models",
        "registered",
        "settings",
    )
    is_full = all(getattr(options, name) >= parser.get_default(name) for name in names_of_full)
    options.row = options.row or names
    options.out = options.out or (RESULTS if is_full and options.peer is None else TRY_RESULTS)
    return options


if __name__ == "__main__":
    main()
