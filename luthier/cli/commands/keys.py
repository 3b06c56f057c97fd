"""`luthier keys`: make, list and revoke API keys."""

from typing import TYPE_CHECKING, Annotated

import typer

from luthier.cli.options import Json, client_command
from luthier.cli.output import local_time, print_json, print_list

if TYPE_CHECKING:
    from luthier.client import LuthierClient

keys_app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)


@keys_app.command("create")
@client_command
def create_key(
    client: "LuthierClient",
    name: Annotated[str, typer.Option(help="What the key is for.")],
    project: Annotated[str | None, typer.Option(help="Project that it opens, made when new.")] = None,
    as_json: Json = False,
) -> None:
    """Make a key. It is shown this once."""
    made = client.create_key(name, project=project)
    if as_json:
        print_json(made)
        return
    print(f"{made['key']}\nThis key is shown this once; its id is {made['id']}.")


@keys_app.command("list")
@client_command
def list_keys(client: "LuthierClient", as_json: Json = False) -> None:
    """List keys, without their secret part."""
    columns = {
        "ID": lambda key: key["id"],
        "NAME": lambda key: key["name"],
        "KEY": lambda key: key["prefix"] + "…",
        "PROJECT": lambda key: key["project"],
        "CREATED": lambda key: local_time(key["created_at"]),
    }
    print_list(client.list_keys(), columns, empty="There are no keys.", as_json=as_json)


@keys_app.command("revoke")
@client_command
def revoke_key(client: "LuthierClient", key_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Make a key useless from now on."""
    client.revoke_key(key_id)
    print(f"Revoked {key_id}")
