"""`luthier models`: list, download, pin and delete models."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.options import Json, client_command
from luthier.cli.output import local_time, print_list, printable

if TYPE_CHECKING:
    from luthier.client import LuthierClient

models_app = typer.Typer(help="List, download, pin and delete models.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The model's name.")]


@models_app.command("list")
@client_command
def list_models(client: "LuthierClient", as_json: Json = False) -> None:
    """List the models that can be called."""
    columns = {
        "NAME": lambda model: model["id"],
        "OWNER": lambda model: model["owned_by"],
        "CREATED": lambda model: local_time(model["created"]),
        "NOTE": _note,
    }
    print_list(client.list_models(), columns, empty="There are no models.", as_json=as_json)


@models_app.command("download")
@client_command
def download_model(
    client: "LuthierClient",
    name: Name,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where its files go.")],
) -> None:
    """Download a tuned model's files, verified by sha256; an interrupted download is resumed."""
    for path in client.download_model(name, folder):
        print(path)


@models_app.command("pin")
@client_command
def pin_model(client: "LuthierClient", name: Name) -> None:
    """Let servers keep a tuned model in memory from its next request on."""
    model = client.pin_model(name)
    print(f"{model['id']} stays in memory once it is there.")


@models_app.command("unpin")
@client_command
def unpin_model(client: "LuthierClient", name: Name) -> None:
    """Let a tuned model leave the memory again when others need its room."""
    model = client.pin_model(name, is_pinned=False)
    print(f"{model['id']} may leave the memory when it is idle.")


@models_app.command("delete")
@client_command
def delete_models(
    client: "LuthierClient",
    names: Annotated[list[str], typer.Argument(metavar="NAME", help="The models' names.")],
) -> None:
    """Delete tuned models with their files; refused while an alias, a job or another model needs one."""
    for name in names:
        client.delete_model(name)
        print(f"Deleted {printable(name)}")


def _note(model: dict[str, Any]) -> str:
    """Return where an alias points, and whether a model is pinned."""
    notes = [f"points to {model['alias_of']}"] if model.get("alias_of") else []
    return ", ".join([*notes, *(["pinned"] if model.get("pinned") else [])])
