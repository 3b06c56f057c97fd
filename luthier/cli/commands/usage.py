"""`luthier usage`: requests and tokens of the last days, by project, key and model."""

import time
from typing import Any

from luthier.cli.output import print_json, print_table
from luthier.client import LuthierClient

_DAY_SECONDS = 86400
_GROUPS = ("project_id", "api_key_id", "model")


def show_usage(client: LuthierClient, *, days: int, as_json: bool) -> None:
    """Print a row for each day, project, key and model."""
    today = int(time.time()) // _DAY_SECONDS * _DAY_SECONDS
    buckets = client.list_usage(start_time=today - (days - 1) * _DAY_SECONDS, group_by=_GROUPS)
    if as_json:
        print_json(buckets)
        return
    rows = [(bucket, result) for bucket in buckets for result in bucket["results"]]
    titles = ("DAY (UTC)", "PROJECT", "KEY", "MODEL", "REQUESTS", "INPUT", "CACHED", "OUTPUT")
    print_table(titles, [_row(bucket, result) for bucket, result in rows], empty="Nothing was used.")


def _row(bucket: dict[str, Any], result: dict[str, Any]) -> tuple[object, ...]:
    day = time.strftime("%Y-%m-%d", time.gmtime(bucket["start_time"]))
    counts = ("num_model_requests", "input_tokens", "input_cached_tokens", "output_tokens")
    return (day, *(result[name] for name in _GROUPS), *(result[name] for name in counts))
