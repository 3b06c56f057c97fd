"""`luthier usage`: requests and tokens of the last days, by project, key and model."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.options import Json, client_command
from luthier.cli.output import print_json, print_table

if TYPE_CHECKING:
    from luthier.client import LuthierClient

_DAY_SECONDS = 86400
_GROUPS = ("project_id", "api_key_id", "model")
_COUNTS = ("num_model_requests", "input_tokens", "input_cached_tokens", "output_tokens")


@client_command
def usage(
    client: "LuthierClient",
    days: Annotated[int, typer.Option(help="Days to show, today among them.", min=1, max=366)] = 7,
    as_json: Json = False,
) -> None:
    """Show requests and tokens by day, project, key and model; an admin key sees all projects."""
    today = int(time.time()) // _DAY_SECONDS * _DAY_SECONDS
    buckets = client.list_usage(start_time=today - (days - 1) * _DAY_SECONDS, group_by=_GROUPS)
    if as_json:
        print_json(buckets)
        return
    names = _find_names(client)
    rows = [
        (
            time.strftime("%Y-%m-%d", time.gmtime(bucket["start_time"])),
            *(names.get(result[group], result[group]) for group in _GROUPS),
            *(result[count] for count in _COUNTS),
        )
        for bucket in buckets
        for result in bucket["results"]
    ]
    titles = ("DAY (UTC)", "PROJECT", "KEY", "MODEL", "REQUESTS", "INPUT", "CACHED", "OUTPUT")
    print_table(titles, rows, empty="Nothing was used.")


def _find_names(client: "LuthierClient") -> dict[str, str]:
    """Return ids of keys and projects with their names. Only an admin key may list keys: else none."""
    from luthier.client import ApiError

    try:
        keys = client.list_keys()
    except ApiError as error:
        if error.status != 403:
            raise
        return {}
    named = {key["id"]: key["name"] for key in keys} | {key["project_id"]: key["project"] for key in keys}
    return {name_id: f"{name} ({name_id})" for name_id, name in named.items()}
