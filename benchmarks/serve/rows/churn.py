"""Many LoRA models on one server: what a cold one adds to the first token, and whether anybody is refused.

Cold and warm are seen from outside: a model's very first request beside its second one, both alone. The
weights are in the page cache on both sides, as they were just written.
"""

from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from benchmarks.machine import StolenTime
from benchmarks.serve.artifacts import Published, publish_twin
from benchmarks.serve.bench import Bench
from benchmarks.serve.contestants import PeerProcess
from benchmarks.serve.engine import OurServer, first_token_of, our_server
from benchmarks.serve.figures import percentile, uniform_picks, zipf_picks
from benchmarks.serve.plan import Contest, Setting
from benchmarks.serve.process import SideFailedError
from benchmarks.train.contestants import PeerFailedError
from benchmarks.train.pairs import median_interval

NAME = "churn-200"
# Loaded beside the one that a peer loads.
NUM_LOADED = 100
# Cold loads of one turn, and of one point of the growth.
_NUM_LOADS = 10
_NUM_NEW = 8
_CONCURRENCY = 4
_REQUESTS_A_MODEL = 2
PEER = Contest(
    "hf-load-adapter",
    "PEFT `load_adapter`",
    "serving",
    "serve_hf",
    (Setting("bf16", {"way": "load_adapter"}),),
)


def measure_churn(bench: Bench) -> dict[str, Any]:
    """Measure the row: cold loads, traffic, growth, and the peer's loads in turn with ours.

    Args:
        bench: the run.

    Returns:
        What was found, with its `summary`.
    """
    options = bench.options
    print(f"\n{options.churn_models} LoRA models on one server ({NAME})", flush=True)
    models = bench.models("lora", options.churn_models)
    found: dict[str, Any] = {"num_models": len(models), "summary": {}}
    with our_server(bench.place, bench.client, NAME) as server:
        added = [_added_seconds(server, model, bench) for model in models]
        found["summary"]["added_seconds"] = _percentiles(added)
        print(f"  a cold model adds {_report(found['summary']['added_seconds'])}", flush=True)
        bench.keep(NAME, found)
        for traffic, pick in (("zipf", zipf_picks), ("uniform", uniform_picks)):
            picks = pick(_REQUESTS_A_MODEL * len(models), len(models), seed=1)
            found["summary"][traffic] = _run_traffic(server, [models[place] for place in picks], bench)
            print(f"  {traffic}: {found['summary'][traffic]}", flush=True)
            bench.keep(NAME, found)
    found["summary"]["growth"] = _measure_growth(models, bench)
    bench.keep(NAME, found)
    if bench.wants(PEER.name):
        found["peer"] = _measure_beside_peer(models, bench)
        bench.keep(NAME, found)
    return found


def _added_seconds(server: OurServer, model: Published, bench: Bench) -> float:
    """Return how much longer a model's first request takes than its second."""
    cold, warm = (
        server.first_token_seconds(model, prompt)
        for prompt in bench.prompts.take(2, num_tokens=bench.options.prompt_tokens)
    )
    return cold - warm


def _run_traffic(server: OurServer, models: list[Published], bench: Bench) -> dict[str, Any]:
    """Ask for a sequence of models by a few clients, each of which waits for its answer."""
    prompts = bench.prompts.take(len(models), num_tokens=bench.options.prompt_tokens)
    reported = server.send(
        [
            server.request(model, prompt, num_new=_NUM_NEW)
            for model, prompt in zip(models, prompts, strict=True)
        ],
        concurrency=_CONCURRENCY,
    )
    answers = reported["answers"]
    errors = [answer["error"] for answer in answers if answer["error"] is not None]
    firsts = [first_token_of(answer) for answer in answers if answer["error"] is None]
    return {
        "requests": len(answers),
        "failures": len(errors),
        "first_error": errors[0] if errors else None,
        "requests_per_second": len(answers) / reported["seconds"],
        "first_token_seconds": _percentiles(firsts) if firsts else None,
    }


def _measure_growth(models: list[Published], bench: Bench) -> list[dict[str, Any]]:
    """Return what a cold model adds when 1, 10, 100, 1,000 are registered and have been served."""
    points, number = [], 0
    with our_server(bench.place, bench.client, f"{NAME}-growth") as server:
        for target in _targets(bench.options.registered):
            added = []
            while number < target + _NUM_LOADS:
                twin = publish_twin(models[number % len(models)], number, bench.place.objects)
                number += 1
                if number > target:
                    added.append(_added_seconds(server, twin, bench))
                else:
                    server.first_token_seconds(twin, *bench.prompts.take(1, num_tokens=8))
            points.append({"registered": target, "added_seconds": _percentiles(added)})
            print(
                f"  {target} registered: a cold model adds {_report(points[-1]['added_seconds'])}", flush=True
            )
    return points


def _targets(most: int) -> list[int]:
    targets, target = [], 1
    while target < most:
        targets.append(target)
        target *= 10
    return [*targets, most]


def _measure_beside_peer(models: list[Published], bench: Bench) -> dict[str, Any]:
    """Load models cold on both sides in turn, the peer with many loaded already."""
    loaded = models[: min(NUM_LOADED, len(models))]
    fresh = [
        publish_twin(models[number % len(models)], 100_000 + number, bench.place.objects)
        for number in range(bench.options.pairs * _NUM_LOADS)
    ]
    reported: dict[str, Any] = {"title": PEER.title, "num_loaded": len(loaded), "pairs": []}
    with ExitStack() as stack:
        server = stack.enter_context(our_server(bench.place, bench.client, f"{NAME}-peer"))
        for model in loaded:
            server.first_token_seconds(model, *bench.prompts.take(1, num_tokens=8))
        server.process.pause()
        try:
            peer = PeerProcess(
                PEER,
                PEER.settings[0],
                base=bench.base,
                models=loaded,
                num_threads=bench.options.threads,
                num_streams=1,
                num_tokens=bench.options.prompt_tokens,
                scratch=bench.folder(f"peers-{NAME}"),
            )
            stack.callback(peer.close)
            for pair in range(bench.options.pairs):
                turn = fresh[pair * _NUM_LOADS : (pair + 1) * _NUM_LOADS]
                reported["pairs"].append(_run_pair(server, peer, turn, bench, is_even=pair % 2 == 0))
        except (SideFailedError, PeerFailedError) as error:
            print(f"  {PEER.name} fails: {error}", flush=True)
            return reported | {"failed": str(error)}
    ratios = [pair["peer"]["added_seconds"] / pair["ours"]["added_seconds"] for pair in reported["pairs"]]
    reported["ratio"] = asdict(median_interval(ratios))
    print(
        f"  {PEER.title}, {len(loaded)} loaded: {reported['pairs'][-1]}; ratio {reported['ratio']}",
        flush=True,
    )
    return reported


def _run_pair(
    server: OurServer, peer: PeerProcess, models: list[Published], bench: Bench, *, is_even: bool
) -> dict[str, Any]:
    stolen, pair = StolenTime(), {}
    for who in ("ours", "peer") if is_even else ("peer", "ours"):
        if who == "ours":
            server.process.resume()
            added = [_added_seconds(server, model, bench) for model in models]
            server.process.pause()
            pair[who] = {"added_seconds": percentile(added, 0.5)}
            continue
        peer.resume()
        prompts = bench.prompts.take(len(models), num_tokens=bench.options.prompt_tokens)
        swaps = [
            peer.ask(call="swap", folder=str(model.folder), name=f"fresh{number}", prompt=prompt.token_ids)
            for number, (model, prompt) in enumerate(zip(models, prompts, strict=True))
        ]
        peer.pause()
        pair[who] = {
            key: percentile([swap[key] for swap in swaps], 0.5) for key in ("added_seconds", "load_seconds")
        }
    return pair | {"stolen_share": stolen.share()}


def _percentiles(values: list[float]) -> dict[str, float]:
    return {"p50": percentile(values, 0.5), "p99": percentile(values, 0.99)}


def _report(seconds: dict[str, float]) -> str:
    return f"{1000 * seconds['p50']:.0f} ms (p99 {1000 * seconds['p99']:.0f})"
