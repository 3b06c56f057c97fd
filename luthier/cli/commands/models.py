"""`luthier models`: what can be called, its files, what stays in memory, and what goes."""

from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli import options
from luthier.cli.options import ApiKey, BaseUrl, Home, Json

models_app = typer.Typer(help="List, download, pin and delete models.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(help="The model's name.")]


@models_app.command("list")
def list_models(
    home: Home = None, base_url: BaseUrl = None, api_key: ApiKey = None, as_json: Json = False
) -> None:
    """List the models that can be called."""
    from luthier.cli.output import local_time, print_json, print_table

    with options.open_client(base_url, api_key, home) as client:
        models = client.list_models()
    if as_json:
        print_json(models)
        return
    rows = [(model["id"], model["owned_by"], local_time(model["created"]), _note(model)) for model in models]
    print_table(("NAME", "OWNER", "CREATED", "NOTE"), rows, empty="There are no models.")


@models_app.command("download")
def download_model(
    name: Name,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where its files go.")],
    home: Home = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Download a tuned model's files, verified by sha256; a broken download goes on where it stopped."""
    with options.open_client(base_url, api_key, home) as client:
        for path in client.download_model(name, folder):
            print(path)


@models_app.command("pin")
def pin_model(name: Name, home: Home = None, base_url: BaseUrl = None, api_key: ApiKey = None) -> None:
    """Let servers keep a tuned model in memory from its next request on."""
    _pin(name, home, base_url, api_key, is_pinned=True)


@models_app.command("unpin")
def unpin_model(name: Name, home: Home = None, base_url: BaseUrl = None, api_key: ApiKey = None) -> None:
    """Let a tuned model leave the memory again when others need its room."""
    _pin(name, home, base_url, api_key, is_pinned=False)


@models_app.command("delete")
def delete_model(name: Name, home: Home = None, base_url: BaseUrl = None, api_key: ApiKey = None) -> None:
    """Delete a tuned model with its files; refused while an alias, a job or another model needs it."""
    from luthier.cli.output import printable

    with options.open_client(base_url, api_key, home) as client:
        client.delete_model(name)
    print(f"Deleted {printable(name)}")


def _pin(name: str, home: Home, base_url: BaseUrl, api_key: ApiKey, *, is_pinned: bool) -> None:
    with options.open_client(base_url, api_key, home) as client:
        model = client.pin_model(name, is_pinned=is_pinned)
    stays = "stays in memory once it is there" if model["pinned"] else "may leave the memory when it is idle"
    print(f"{model['id']} {stays}.")


def _note(model: dict[str, Any]) -> str:
    """Return where an alias points, and whether a model is pinned."""
    notes = [f"points to {model['alias_of']}"] if model.get("alias_of") else []
    return ", ".join([*notes, *(["pinned"] if model.get("pinned") else [])])
