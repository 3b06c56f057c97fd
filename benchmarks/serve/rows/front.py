"""The API in between against the engine alone: tokens a second of the same streams on the same engine."""

import statistics
from dataclasses import asdict
from typing import Any

from benchmarks.machine import StolenTime
from benchmarks.serve.api_process import Api, api_in_front
from benchmarks.serve.bench import Bench
from benchmarks.serve.contestants import read_answers
from benchmarks.serve.engine import OurServer, our_server
from benchmarks.serve.plan import NUM_STREAMS
from benchmarks.train.pairs import median_interval

NAME = "front"
# How the engine listens. Over TCP both are asked alike, as clients ask the API, which asks the engine so too,
# as in a cluster. On one machine the engine has a Unix socket, and no client but the API.
_ADDRESSES = ("tcp", "unix")


def measure_front(bench: Bench) -> dict[str, Any]:
    """Run the base's streams through the API and straight into the engine, in turn.

    Args:
        bench: the run.

    Returns:
        For an engine on TCP, and for one on its Unix socket, every pair and the `summary`; a ratio is the
        API's tokens a second over the engine's.
    """
    print(f"\n{NUM_STREAMS} streams through the API beside the engine alone ({NAME})", flush=True)
    found: dict[str, Any] = {"num_streams": NUM_STREAMS}
    for address in _ADDRESSES:
        print(f"  the engine on {address}", flush=True)
        found[address] = _measure(bench, is_tcp=address == "tcp")
        bench.keep(NAME, found)
    return found


def _measure(bench: Bench, *, is_tcp: bool) -> dict[str, Any]:
    pairs: list[dict[str, Any]] = []
    with (
        our_server(bench.place, bench.client, NAME, is_tcp=is_tcp) as server,
        api_in_front(server) as api,
    ):
        _run(bench, server, api)
        _run(bench, server)
        for number in range(bench.options.pairs):
            stolen, pair = StolenTime(), {}
            for who in ("engine", "api") if number % 2 == 0 else ("api", "engine"):
                pair[who] = _run(bench, server, None if who == "engine" else api)
            pair["ratio"] = pair["api"]["tokens_per_second"] / pair["engine"]["tokens_per_second"]
            pairs.append(pair | {"stolen_share": stolen.share()})
            print(f"  pair {number + 1}: {pairs[-1]}", flush=True)
    summary: dict[str, Any] = {
        figure: {who: statistics.median(pair[who][figure] for pair in pairs) for who in ("engine", "api")}
        for figure in ("tokens_per_second", "first_token_seconds_p50")
    }
    summary["ratio"] = asdict(median_interval([pair["ratio"] for pair in pairs]))
    return {"pairs": pairs, "summary": summary}


def _run(bench: Bench, server: OurServer, api: Api | None = None) -> dict[str, Any]:
    options = bench.options
    prompts = bench.prompts.take(NUM_STREAMS, num_tokens=options.prompt_tokens)
    if api is None:
        reported = server.send(
            [server.request(None, prompt, num_new=options.new_tokens) for prompt in prompts]
        )
    else:
        reported = bench.client.send(
            api.url,
            [api.request(server.place.base_id, prompt, num_new=options.new_tokens) for prompt in prompts],
        )
    run = read_answers(reported, bench.tokenizer, options.new_tokens)
    del run["answers"]
    return run | {"tokens_per_second": sum(run["num_tokens"]) / run["seconds"]}
