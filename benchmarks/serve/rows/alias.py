"""A new version under an alias while requests come at an even rate: who fails, waits, gets the old one.

The new version is one that the server has never met. The rate is the clients', whether answers come or not.
"""

from itertools import pairwise
from typing import Any

from benchmarks.serve.api_process import Api, api_in_front
from benchmarks.serve.bench import Bench
from benchmarks.serve.engine import first_token_of, our_server
from benchmarks.serve.figures import percentile
from benchmarks.serve.process import SideFailedError

NAME = "alias"
REQUESTS_A_SECOND = 20
_ALIAS = "bench/alias"
_PATH = "/v1/aliases/bench%2Falias"
_SECONDS = 8.0
# When the alias is pointed to the new version.
_SWITCH_SECONDS = 3.0
_NUM_NEW = 4
_PROMPT_TOKENS = 24


def measure_alias(bench: Bench) -> dict[str, Any]:
    """Point an alias to new versions under traffic, once a pair.

    Args:
        bench: the run.

    Returns:
        Every try and the `summary`.
    """
    print(f"\nA new version under an alias at {REQUESTS_A_SECOND} requests/s ({NAME})", flush=True)
    versions = bench.models("lora", bench.options.pairs + 1)
    tries: list[dict[str, Any]] = []
    with (
        our_server(bench.place, bench.client, NAME) as server,
        api_in_front(server, versions) as api,
    ):
        _point(bench, api, versions[0].name)
        _run(bench, api, [])
        for old, new in pairwise(versions):
            reported = _run(bench, api, [_put(api, new.name, at_seconds=_SWITCH_SECONDS)])
            tries.append(_read(reported["answers"], old.digest, new.digest))
            print(f"  {tries[-1]}", flush=True)
    found = {
        "requests_per_second": REQUESTS_A_SECOND,
        "tries": tries,
        "summary": {
            "requests": sum(one["requests"] for one in tries),
            "failures": sum(one["failures"] for one in tries),
            "of_neither": sum(one["of_neither"] for one in tries),
            "late_of_old": sum(one["late_of_old"] for one in tries),
            **{
                key: percentile([one[key] for one in tries], 0.5)
                for key in ("switch_seconds", "before_p50", "before_p99", "around_p50", "around_p99")
            },
        },
    }
    bench.keep(NAME, found)
    return found


def _put(api: Api, model: str, *, at_seconds: float = 0.0) -> dict[str, Any]:
    return {
        "method": "PUT",
        "path": _PATH,
        "headers": api.headers,
        "body": {"model": model},
        "at_seconds": at_seconds,
    }


def _point(bench: Bench, api: Api, model: str) -> None:
    error = bench.client.send(api.url, [_put(api, model)])["answers"][0]["error"]
    if error is not None:
        raise SideFailedError(f"the alias can't be pointed: {error}")


def _run(bench: Bench, api: Api, more: list[dict[str, Any]]) -> dict[str, Any]:
    """Send requests at the rate, and what else is to be sent, last."""
    count = round(_SECONDS * REQUESTS_A_SECOND)
    prompts = bench.prompts.take(count, num_tokens=_PROMPT_TOKENS)
    requests = [
        api.request(_ALIAS, prompt, num_new=_NUM_NEW, at_seconds=number / REQUESTS_A_SECOND)
        for number, prompt in enumerate(prompts)
    ]
    return bench.client.send(api.url, [*requests, *more])


def _read(answers: list[dict[str, Any]], old: str, new: str) -> dict[str, Any]:
    """Separate the requests before the switch from those around and after it."""
    *asked, switch = answers
    if switch["error"] is not None:
        raise SideFailedError(f"the alias can't be pointed: {switch['error']}")
    good = [answer for answer in asked if answer["error"] is None]
    before = [first_token_of(one) for one in good if one["end"] < switch["sent"]]
    around = [first_token_of(one) for one in good if one["end"] >= switch["sent"]]
    if not before or not around:
        raise SideFailedError("no request was answered before the switch, or none after it")
    errors = [answer["error"] for answer in asked if answer["error"] is not None]
    return {
        "requests": len(asked),
        "failures": len(errors),
        "first_error": errors[0] if errors else None,
        "of_neither": sum(one["digest"] not in (old, new) for one in good),
        "late_of_old": sum(one["sent"] > switch["end"] and one["digest"] == old for one in good),
        "switch_seconds": switch["end"] - switch["sent"],
        "before_p50": percentile(before, 0.5),
        "before_p99": percentile(before, 0.99),
        "around_p50": percentile(around, 0.5),
        "around_p99": percentile(around, 0.99),
    }
