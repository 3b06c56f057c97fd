"""The API in between against the engine alone: tokens a second of the same streams on the same engine."""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.contestants import quiet_environment
from benchmarks.machine import StolenTime
from benchmarks.pairs import median_interval
from benchmarks.serve.bench import Bench
from benchmarks.serve.contestants import free_port, read_answers
from benchmarks.serve.engine import COMPLETIONS, OurServer, completion_body, our_server
from benchmarks.serve.process import Process, SideFailedError
from benchmarks.serve.rows import NUM_STREAMS
from benchmarks.throw_away import throw_away_postgres
from db.session import Database
from luthier.bases.catalogue import find_base_facts
from luthier.core.keys import new_api_key
from luthier.core.settings import Settings
from services.bootstrap import ensure_first_rows
from services.models import record_base

NAME = "front"
_START_SECONDS = 60.0
_FASTER_DATABASE = ("fsync=off",)


def measure_front(bench: Bench) -> dict[str, Any]:
    """Run the base's streams through the API and straight into the engine, in turn.

    Args:
        bench: the run.

    Returns:
        Every pair and the `summary`; a ratio is the API's tokens a second over the engine's.
    """
    print(f"\n{NUM_STREAMS} streams through the API beside the engine alone ({NAME})", flush=True)
    pairs: list[dict[str, Any]] = []
    with our_server(bench.place, bench.client, NAME) as server, _api(server) as (url, key):
        _run(bench, server, url=url, key=key)
        _run(bench, server)
        for number in range(bench.options.pairs):
            stolen, pair = StolenTime(), {}
            for who in ("engine", "api") if number % 2 == 0 else ("api", "engine"):
                pair[who] = _run(bench, server, **({} if who == "engine" else {"url": url, "key": key}))
            pair["ratio"] = pair["api"]["tokens_per_second"] / pair["engine"]["tokens_per_second"]
            pairs.append(pair | {"stolen_share": stolen.share()})
            print(f"  pair {number + 1}: {pairs[-1]}", flush=True)
    found = {
        "num_streams": NUM_STREAMS,
        "pairs": pairs,
        "summary": {
            "tokens_per_second": {
                who: statistics.median(pair[who]["tokens_per_second"] for pair in pairs)
                for who in ("engine", "api")
            },
            "first_token_seconds_p50": {
                who: statistics.median(pair[who]["first_token_seconds_p50"] for pair in pairs)
                for who in ("engine", "api")
            },
            "ratio": asdict(median_interval([pair["ratio"] for pair in pairs])),
        },
    }
    bench.keep(NAME, found)
    return found


def _run(bench: Bench, server: OurServer, *, url: str | None = None, key: str = "") -> dict[str, Any]:
    options = bench.options
    prompts = bench.prompts.take(NUM_STREAMS, num_tokens=options.prompt_tokens)
    if url is None:
        told = server.send([server.request(None, prompt, num_new=options.new_tokens) for prompt in prompts])
    else:
        told = bench.client.send(
            url,
            [
                {
                    "path": COMPLETIONS,
                    "headers": {"authorization": f"Bearer {key}"},
                    "body": completion_body(
                        server.place.base_id, prompt.token_ids, num_new=options.new_tokens
                    ),
                }
                for prompt in prompts
            ],
        )
    run = read_answers(told, bench.tokenizer, options.new_tokens)
    del run["answers"]
    return run | {"tokens_per_second": sum(run["num_tokens"]) / run["seconds"]}


@contextmanager
def _api(server: OurServer) -> Iterator[tuple[str, str]]:
    """Run an API process over a fresh database, in front of a server; yield its URL and a key."""
    key = new_api_key()
    with tempfile.TemporaryDirectory(prefix="lt-front-", dir="/tmp") as name:
        folder = Path(name)
        # The database's user must pass through it.
        folder.chmod(0o755)
        with throw_away_postgres(folder, _FASTER_DATABASE) as url:
            _fill(url, key, server)
            port = free_port()
            environment = quiet_environment(os.cpu_count() or 1) | {
                "LUTHIER_DATABASE_URL": url,
                "LUTHIER_REDIS_URL": "redis+socket:///nowhere",
                "LUTHIER_STORAGE_URL": f"file://{server.place.objects}",
                "LUTHIER_BASES_DIR": str(server.place.bases_dir),
                "LUTHIER_INFERENCE_URL": server.url,
            }
            log = folder / "api.log"
            process = Process([sys.executable, "-m", "api", "--port", str(port)], environment, log)
            try:
                _wait_for(port, process)
                yield f"http://127.0.0.1:{port}", key
            finally:
                process.close()


def _fill(url: str, key: str, server: OurServer) -> None:
    settings = Settings(_env_file=None, database_url=url, bootstrap_api_key=key)  # type: ignore[call-arg]
    facts = find_base_facts(server.place.bases_dir, server.place.base_id)
    assert facts is not None, "the server has loaded it"
    database = Database(url, pool_size=1)
    with database.transaction() as session:
        ensure_first_rows(session, settings)
        record_base(session, facts)
    database.close()


def _wait_for(port: int, process: Process) -> None:
    import socket

    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        process.check()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise SideFailedError(f"the API did not listen within {_START_SECONDS:.0f} s")
