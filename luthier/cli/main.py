"""The command `luthier`: its commands and options. What a command needs is imported when it runs."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from luthier.cli import options
from luthier.cli.commands.aliases import aliases_app
from luthier.cli.commands.files import files_app
from luthier.cli.commands.jobs import jobs_app
from luthier.cli.commands.models import models_app
from luthier.cli.options import ApiKey, BaseUrl, Home, Json
from luthier.core.errors import LuthierError

app = typer.Typer(
    name="luthier",
    help="Fine-tuning jobs as an API, with the weights in your own hands.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
keys_app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)
bases_app = typer.Typer(help="List and fetch base models.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")
app.add_typer(bases_app, name="bases")
app.add_typer(files_app, name="files")
app.add_typer(jobs_app, name="jobs")
app.add_typer(models_app, name="models")
app.add_typer(aliases_app, name="aliases")


def _print_version(is_asked: bool) -> None:
    if is_asked:
        import importlib.metadata

        print(importlib.metadata.version("luthier"))
        raise typer.Exit


@app.callback()
def luthier(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Fine-tuning jobs as an API, with the weights in your own hands."""


@app.command()
def version() -> None:
    """Print the version."""
    _print_version(True)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A base, a tuned model, a checkpoint or an alias.")],
    message: Annotated[str | None, typer.Argument(help="One message; without it, a conversation.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.", min=1)] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 for the likeliest answer.", min=0, max=2)
    ] = None,
    home: Home = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Talk to a model; answers are printed as they come."""
    from luthier.cli.commands.chat import chat_with

    parameters = {"max_tokens": max_tokens, "temperature": temperature}
    with options.open_client(base_url, api_key, home) as client:
        chat_with(client, model, message, system=system, parameters=parameters)


@app.command()
def up(
    home: Home = None,
    port: Annotated[int, typer.Option(help="Port of the API.", min=1, max=65535)] = 8000,
    host: Annotated[str, typer.Option(help="Address that the API binds.")] = "127.0.0.1",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "",
) -> None:
    """Run the whole service in the foreground until Ctrl-C."""
    from luthier.cli.settings import read_settings
    from luthier.cli.stack.home import resolve_home
    from luthier.cli.stack.up import up as run_up

    run_up(resolve_home(home), host=host, port=port, settings=read_settings(log_level))


@app.command()
def doctor(
    home: Home = None, base_url: BaseUrl = None, api_key: ApiKey = None, as_json: Json = False
) -> None:
    """Check this machine and the service, and say what to do about each fault."""
    from luthier.cli.doctor.report import run_doctor
    from luthier.cli.stack.home import resolve_home

    raise typer.Exit(run_doctor(resolve_home(home), base_url=base_url, api_key=api_key, as_json=as_json))


@app.command()
def check(file: Annotated[Path, typer.Argument(help="Training file, one JSON object a line.")]) -> None:
    """Check a training file's format on this machine, before any upload."""
    from luthier.cli.commands.check import check_file

    check_file(file)


@app.command()
def usage(
    days: Annotated[int, typer.Option(help="Days to show, today among them.", min=1, max=366)] = 7,
    home: Home = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Show requests and tokens by day, project, key and model; an admin key sees all projects."""
    from luthier.cli.commands.usage import show_usage

    with options.open_client(base_url, api_key, home) as client:
        show_usage(client, days=days, as_json=as_json)


@keys_app.command("create")
def create_key(
    name: Annotated[str, typer.Option(help="What the key is for.")],
    project: Annotated[str | None, typer.Option(help="Project that it opens, made when new.")] = None,
    home: Home = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Make a key. It is shown this once."""
    from luthier.cli.output import print_json

    with options.open_client(base_url, api_key, home) as client:
        made = client.create_key(name, project=project)
    if as_json:
        print_json(made)
        return
    print(f"{made['key']}\nThis key is shown this once; its id is {made['id']}.")


@keys_app.command("list")
def list_keys(
    home: Home = None, base_url: BaseUrl = None, api_key: ApiKey = None, as_json: Json = False
) -> None:
    """List keys, without their secret part."""
    from luthier.cli.output import local_time, print_json, print_table

    with options.open_client(base_url, api_key, home) as client:
        keys = client.list_keys()
    if as_json:
        print_json(keys)
        return
    rows = [
        (key["id"], key["name"], key["prefix"] + "…", key["project"], local_time(key["created_at"]))
        for key in keys
    ]
    print_table(("ID", "NAME", "KEY", "PROJECT", "CREATED"), rows, empty="There are no keys.")


@keys_app.command("revoke")
def revoke_key(
    key_id: Annotated[str, typer.Argument(metavar="ID")],
    home: Home = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
) -> None:
    """Make a key useless from now on."""
    with options.open_client(base_url, api_key, home) as client:
        client.revoke_key(key_id)
    print(f"Revoked {key_id}")


@bases_app.command("list")
def list_bases(as_json: Json = False) -> None:
    """List the base models of models.toml and whether each is fetched."""
    from luthier.cli.commands.bases import print_bases

    print_bases(as_json=as_json)


@bases_app.command("fetch")
def fetch_base(base_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Fetch a base model, and convert and seal it where that is needed."""
    from luthier.cli.commands.bases import fetch

    fetch(base_id)


def main() -> None:
    """Run the command line; a failure that a user can mend is one line on standard error and exit code 1."""
    try:
        app()
    except LuthierError as error:
        print(f"luthier: {error.message}", file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
