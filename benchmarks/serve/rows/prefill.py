"""How long a short request waits for its first token while a long prompt is taken in, beside idle."""

from dataclasses import asdict
from typing import Any

from benchmarks.machine import StolenTime
from benchmarks.serve.bench import Bench
from benchmarks.serve.engine import OurServer, first_token_of, our_server
from benchmarks.serve.figures import percentile
from benchmarks.train.pairs import median_interval

NAME = "prefill"
_SHORT_TOKENS = 32
_NUM_SHORT = 6
# When short requests come, one by one, as shares of the long prompt's own time to first token: a step
# takes longer the more of the prompt is before it, and who comes early in a step waits longer.
_SHARES = (0.08, 0.24, 0.4, 0.56, 0.72, 0.88)


def measure_prefill(bench: Bench) -> dict[str, Any]:
    """Ask short questions alone, and then at moments of a long prompt's prefill, in turn.

    Args:
        bench: the run.

    Returns:
        Every pair and the `summary`; a ratio is the busy value over the idle one.
    """
    length = bench.options.long_prompt_tokens
    print(f"\nA short request while a {length}-token prompt is taken in ({NAME})", flush=True)
    pairs: list[dict[str, Any]] = []
    with our_server(bench.place, bench.client, NAME) as server:
        alone = server.first_token_seconds(None, *bench.prompts.take(1, num_tokens=length))
        _idle(server, bench)
        for number in range(bench.options.pairs):
            stolen, pair = StolenTime(), {}
            for what in ("idle", "busy") if number % 2 == 0 else ("busy", "idle"):
                pair |= _idle(server, bench) if what == "idle" else _busy(server, bench, alone)
            pairs.append(pair | {"stolen_share": stolen.share()})
            print(f"  pair {number + 1}: {pairs[-1]}", flush=True)
    found = {
        "long_prompt_tokens": length,
        "short_prompt_tokens": _SHORT_TOKENS,
        "pairs": pairs,
        "summary": {
            key: percentile([pair[key] for pair in pairs], 0.5)
            for key in ("idle_seconds", "busy_seconds", "long_seconds")
        }
        | {
            "long_alone_seconds": alone,
            "ratio": asdict(median_interval([pair["busy_seconds"] / pair["idle_seconds"] for pair in pairs])),
            "long_ratio": asdict(median_interval([pair["long_seconds"] / alone for pair in pairs])),
        },
    }
    bench.keep(NAME, found)
    return found


def _idle(server: OurServer, bench: Bench) -> dict[str, float]:
    prompts = bench.prompts.take(_NUM_SHORT, num_tokens=_SHORT_TOKENS)
    return {"idle_seconds": percentile([server.first_token_seconds(None, one) for one in prompts], 0.5)}


def _busy(server: OurServer, bench: Bench, alone: float) -> dict[str, float]:
    (long,) = bench.prompts.take(1, num_tokens=bench.options.long_prompt_tokens)
    shorts = bench.prompts.take(len(_SHARES), num_tokens=_SHORT_TOKENS)
    reported = server.send(
        [
            server.request(None, long, num_new=1),
            *(
                server.request(None, short, num_new=1, at_seconds=share * alone)
                for share, short in zip(_SHARES, shorts, strict=True)
            ),
        ]
    )
    long_seconds, *busy_seconds = map(first_token_of, reported["answers"])
    return {"busy_seconds": percentile(busy_seconds, 0.5), "long_seconds": long_seconds}
