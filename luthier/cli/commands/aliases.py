"""`luthier aliases`: a project's own names for models."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.options import Json, client_command
from luthier.cli.output import local_time, print_json, print_list, printable

if TYPE_CHECKING:
    from luthier.client import LuthierClient

aliases_app = typer.Typer(
    help="Point names of your own to models, and back to what they pointed to.", no_args_is_help=True
)

Name = Annotated[str, typer.Argument(help="The alias.")]


@aliases_app.command("put")
@client_command
def put_alias(
    client: "LuthierClient",
    name: Name,
    model: Annotated[str, typer.Argument(help="Base, tuned model or checkpoint.")],
    as_json: Json = False,
) -> None:
    """Point an alias to a model; it is made when it is new. The next request is answered by that model."""
    _print_alias(client.put_alias(name, model), as_json=as_json)


@aliases_app.command("list")
@client_command
def list_aliases(client: "LuthierClient", as_json: Json = False) -> None:
    """List the aliases and what they point to."""
    columns = {
        "NAME": lambda alias: alias["name"],
        "MODEL": lambda alias: alias["model"],
        "VERSION": lambda alias: alias["version"],
        "SINCE": lambda alias: local_time(alias["updated_at"]),
    }
    print_list(client.list_aliases(), columns, empty="There are no aliases.", as_json=as_json)


@aliases_app.command("history")
@client_command
def list_versions(client: "LuthierClient", name: Name, as_json: Json = False) -> None:
    """List what an alias has pointed to, newest first."""
    columns = {
        "VERSION": lambda version: version["version"],
        "MODEL": lambda version: version["model"],
        "RESTORED": lambda version: version["restored_version"] or "-",
        "BY KEY": lambda version: version["created_by_key_id"] or "-",
        "SINCE": lambda version: local_time(version["created_at"]),
    }
    print_list(client.list_alias_versions(name), columns, empty="There are no versions.", as_json=as_json)


@aliases_app.command("rollback")
@client_command
def roll_back_alias(
    client: "LuthierClient",
    name: Name,
    version: Annotated[int | None, typer.Option(help="Version; else the one before.", min=1)] = None,
    as_json: Json = False,
) -> None:
    """Point an alias to what it pointed to before."""
    _print_alias(client.roll_back_alias(name, version=version), as_json=as_json)


@aliases_app.command("delete")
@client_command
def delete_alias(client: "LuthierClient", name: Name) -> None:
    """Delete an alias with its history; the model that it points to stays."""
    client.delete_alias(name)
    print(f"Deleted {printable(name)}")


def _print_alias(alias: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        print_json(alias)
        return
    print(f"{printable(alias['name'])} is {printable(alias['model'])} now, version {alias['version']}.")
    # Null for a base; absent in answers of an older version.
    if alias.get("proved") is False:
        print("No inference server has answered with it yet: its first request will tell whether one can.")
