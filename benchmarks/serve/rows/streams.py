"""The rows of streams: all sides run the same prompts in turn, A B B A; who is not in turn stands still."""

import statistics
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from typing import Any

from benchmarks.machine import Shape, StolenTime
from benchmarks.serve.artifacts import Published
from benchmarks.serve.bench import Bench
from benchmarks.serve.contestants import (
    Contestant,
    Ours,
    PeerProcess,
    Streams,
    TransformersServe,
    texts_as_tokens,
)
from benchmarks.serve.engine import our_server
from benchmarks.serve.figures import agreement
from benchmarks.serve.limits import Limits, Work, best_tokens_per_second
from benchmarks.serve.plan import STREAM_ROWS, Contest, Setting, StreamRow
from benchmarks.serve.process import SideFailedError
from benchmarks.train.contestants import PeerFailedError
from benchmarks.train.pairs import MAX_STOLEN, median_interval

OURS = "ours"


def kept(rounds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rounds in which the host took little time."""
    return [one for one in rounds if one["stolen_share"] <= MAX_STOLEN]


def summarise(found: dict[str, Any], models: Sequence[Published | None], shape: Shape) -> dict[str, Any]:
    """Return medians, shares and ratios over the rounds that count.

    Args:
        found: the row, with its rounds.
        models: of its streams.
        shape: of the base.

    Returns:
        The `summary`.
    """
    rounds = kept(found["rounds"]) or found["rounds"]
    num_new = found["num_new_tokens"]
    names = list(rounds[0]["runs"])
    # Virtual tokens are no weights of linear layers.
    weights = sum(
        model.num_parameters for model in models if model is not None and model.kind in ("lora", "adapter")
    )
    sizes = (found["num_streams"], found["num_prompt_tokens"], num_new, weights, weights)
    work = Work(shape, *sizes)
    bounds = [best_tokens_per_second(work, Limits(**one["limits"])) for one in rounds]

    def median(name: str, key: str) -> float:
        return statistics.median(one["runs"][name][key] for one in rounds)

    def share(name: str, bound: str) -> float:
        speeds = [one["runs"][name]["tokens_per_second"] for one in rounds]
        return statistics.median(speed / one[bound] for speed, one in zip(speeds, bounds, strict=True))

    summary: dict[str, Any] = {
        "num_rounds": len(rounds),
        "tokens_per_second": {name: median(name, "tokens_per_second") for name in names},
        "limit_tokens_per_second": {
            key: statistics.median(bound[key] for bound in bounds) for key in bounds[0]
        },
        "share_of_limit": {name: {key: share(name, key) for key in ("steps", "run")} for name in names},
        "ours": {
            key: median(OURS, key)
            for key in ("first_token_seconds_p50", "gap_seconds_p50", "gap_seconds_p99")
        },
        "limits": {
            key: statistics.median(one["limits"][key] for one in rounds) for key in rounds[0]["limits"]
        },
        "stolen_share": statistics.median(one["stolen_share"] for one in rounds),
        "has_equal_tokens": all(
            count == num_new for one in rounds for run in one["runs"].values() for count in run["num_tokens"]
        ),
        "ratios": {},
        "agreement": {},
    }
    for name in names:
        if name == OURS:
            continue
        ratios = [
            one["runs"][OURS]["tokens_per_second"] / one["runs"][name]["tokens_per_second"] for one in rounds
        ]
        summary["ratios"][name] = asdict(median_interval(ratios))
        held = [one["runs"][name].get("agreement") for one in rounds]
        if held[0] is not None:
            summary["agreement"][name] = {key: statistics.fmean(one[key] for one in held) for key in held[0]}
    return summary


# A number of tries that stands for a host that is never quiet.
_MAX_TRIES_A_ROUND = 2


def measure_streams(row: StreamRow, bench: Bench) -> dict[str, Any]:
    """Measure a row.

    Args:
        row: what is served beside which peer.
        bench: the run.

    Returns:
        Every round's runs, every peer's settings and the `summary`.
    """
    print(f"\n{row.title} ({row.name})", flush=True)
    options = bench.options
    found: dict[str, Any] = {
        "title": row.title,
        "num_streams": row.num_streams,
        "num_prompt_tokens": options.prompt_tokens,
        "num_new_tokens": options.new_tokens,
        "peers": {},
        "rounds": [],
    }
    models = _models_of(row, bench)
    with ExitStack() as stack:
        server = stack.enter_context(our_server(bench.place, bench.client, row.name))
        ours = Ours(server, bench.tokenizer)
        sides: dict[str, tuple[Contestant, list[Published | None]]] = {OURS: (ours, models)}
        if row.beside is not None:
            sides[f"{OURS}, {row.beside}"] = (ours, _models_of(STREAM_ROWS[row.beside], bench))
        if row.is_also_plain:
            ours.pause()
            sides[f"{OURS}, guessing nothing"] = (_start_plain(row, bench, stack), models)
            ours.resume()
        # What a new process pays once is no row's concern.
        ours.run(_streams(models, bench))
        ours.pause()
        for contest in row.contests:
            if not bench.wants(contest.name):
                continue
            peer = _choose(contest, row, bench, found)
            if peer is not None:
                stack.callback(peer.close)
                sides[contest.name] = (peer, models)
            bench.keep(row.name, found)
        _run_rounds(row, bench, sides, found)
    return found


def _start_plain(row: StreamRow, bench: Bench, stack: ExitStack) -> Ours:
    """Start our server as it is without speculative decoding, and let it stand still when it has run once."""
    plain = {"LUTHIER_MAX_DRAFT_TOKENS": "0"}
    server = stack.enter_context(our_server(bench.place, bench.client, f"{row.name}-plain", plain))
    side = Ours(server, bench.tokenizer)
    side.run(_streams(_models_of(row, bench), bench))
    side.pause()
    return side


def _models_of(row: StreamRow, bench: Bench) -> list[Published | None]:
    if not row.models:
        return [None] * row.num_streams
    return [model for kind, count in row.models.items() for model in bench.models(kind, count)]


@contextmanager
def _awake(side: Contestant) -> Iterator[None]:
    """Let a side run for the length of a block."""
    side.resume()
    try:
        yield
    finally:
        side.pause()


def _streams(models: list[Published | None], bench: Bench, *, num_new: int | None = None) -> Streams:
    prompts = bench.prompts.take(len(models), num_tokens=bench.options.prompt_tokens)
    return Streams(prompts, models, num_new or bench.options.new_tokens)


def _warm(side: Contestant, models: list[Published | None], bench: Bench) -> None:
    side.run(_streams(models, bench, num_new=min(4, bench.options.new_tokens)))


def _open(
    contest: Contest, setting: Setting, row: StreamRow, bench: Bench
) -> PeerProcess | TransformersServe:
    folder = bench.folder(f"peers-{row.name}")
    if contest.script == "transformers serve":
        return TransformersServe(
            contest,
            setting,
            base=bench.base,
            num_threads=bench.options.threads,
            client=bench.client,
            tokenizer=bench.tokenizer,
            scratch=folder,
        )
    return PeerProcess(
        contest,
        setting,
        base=bench.base,
        models=[model for model in _models_of(row, bench) if model is not None],
        num_threads=bench.options.threads,
        num_streams=row.num_streams,
        num_tokens=bench.options.prompt_tokens + bench.options.new_tokens,
        scratch=folder,
    )


def _choose(contest: Contest, row: StreamRow, bench: Bench, found: dict[str, Any]) -> Contestant | None:
    """Try a peer's settings, and return the fastest, loaded, warm and standing still; None when none runs."""
    reported = found["peers"][contest.name] = {
        "title": contest.title,
        "in_process": contest.in_process,
        "settings": {},
    }
    best: tuple[float, str, PeerProcess | TransformersServe] | None = None
    models = _models_of(row, bench)
    streams = _streams(models, bench)
    for setting in contest.settings[: bench.options.settings]:
        try:
            side = _open(contest, setting, row, bench)
        except (SideFailedError, PeerFailedError) as error:
            reported["settings"][setting.name] = {"failed": str(error)}
            print(f"  {contest.name}, {setting.name}: fails: {error}", flush=True)
            continue
        try:
            _warm(side, models, bench)
            # The first run of this length may compile or grow something.
            side.run(_streams(models, bench))
            run = side.run(streams)
        except SideFailedError as error:
            reported["settings"][setting.name] = {"failed": str(error)}
            print(f"  {contest.name}, {setting.name}: fails: {error}", flush=True)
            side.close()
            continue
        side.pause()
        speed = sum(run["num_tokens"]) / run["seconds"]
        reported["settings"][setting.name] = {"tokens_per_second": speed} | side.started
        print(f"  {contest.name}, {setting.name}: {speed:.1f} tokens/s", flush=True)
        if best is not None and best[0] >= speed:
            side.close()
            continue
        if best is not None:
            best[2].close()
        best = (speed, setting.name, side)
    if best is None:
        reported["failed"] = next(
            (one["failed"] for one in reported["settings"].values() if "failed" in one), "it has no settings"
        )
        return None
    reported["best_setting"] = best[1]
    return best[2]


def _run_rounds(
    row: StreamRow,
    bench: Bench,
    sides: dict[str, tuple[Contestant, list[Published | None]]],
    found: dict[str, Any],
) -> None:
    rounds: list[dict[str, Any]] = found["rounds"]
    wanted, tries = bench.options.pairs, 0
    while len(kept(rounds)) < wanted and tries < wanted * _MAX_TRIES_A_ROUND:
        tries += 1
        limits = bench.limits(row.num_streams)
        prompts = _streams([None] * row.num_streams, bench).prompts
        stolen, runs = StolenTime(), {}
        # A B C, C B A: whatever drifts, drifts for all.
        order = list(sides) if len(rounds) % 2 == 0 else list(sides)[::-1]
        for name in order:
            side, models = sides[name]
            fresh = prompts
            if name == f"{OURS}, {row.beside}":
                # Our own server must not meet a prompt twice.
                fresh = _streams(models, bench).prompts
            with _awake(side):
                # What stood still has cold caches, and ours may have let go of what it has no room for.
                _warm(side, models, bench)
                runs[name] = side.run(Streams(fresh, models, bench.options.new_tokens))
        rounds.append(_report_round(runs, row.beside, limits, stolen.share(), bench))
        found["summary"] = summarise(found, _models_of(row, bench), bench.shape)
        bench.keep(row.name, found)
        _print_round(len(rounds), rounds[-1])


def _report_round(
    runs: dict[str, dict[str, Any]], beside: str | None, limits: Limits, stolen_share: float, bench: Bench
) -> dict[str, Any]:
    """Return a round as it is stored: without the answers' tokens, with how far they agree with ours.

    The row `beside` ours had other prompts.
    """
    ours = texts_as_tokens(runs[OURS]["answers"], bench.tokenizer)
    reported: dict[str, Any] = {}
    for name, run in runs.items():
        one = {key: value for key, value in run.items() if key != "answers"}
        one["tokens_per_second"] = sum(run["num_tokens"]) / run["seconds"]
        if name not in (OURS, f"{OURS}, {beside}"):
            one["agreement"] = agreement(ours, texts_as_tokens(run["answers"], bench.tokenizer))
        reported[name] = one
    return {"runs": reported, "limits": asdict(limits), "stolen_share": stolen_share}


def _print_round(number: int, one: dict[str, Any]) -> None:
    speeds = ", ".join(f"{name} {run['tokens_per_second']:.1f}" for name, run in one["runs"].items())
    limits = one["limits"]
    print(
        f"  round {number}: {speeds} tokens/s; bf16 GEMM {limits['gemm_bf16_gflops']:.0f} GFLOP/s, read "
        f"{limits['read_gigabytes_per_second']:.0f}, copy {limits['copy_gigabytes_per_second']:.0f} GB/s; "
        f"stolen {100 * one['stolen_share']:.1f} %",
        flush=True,
    )
