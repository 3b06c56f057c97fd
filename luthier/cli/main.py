"""The command `luthier`: its commands and entry point. Heavy imports are inside the commands."""

import sys
from typing import Annotated

import typer

from luthier.cli.commands.aliases import aliases_app
from luthier.cli.commands.bases import bases_app
from luthier.cli.commands.chat import chat
from luthier.cli.commands.check import check
from luthier.cli.commands.files import files_app
from luthier.cli.commands.jobs import jobs_app
from luthier.cli.commands.keys import keys_app
from luthier.cli.commands.models import models_app
from luthier.cli.commands.usage import usage
from luthier.cli.options import ApiKey, BaseUrl, Home, Json
from luthier.core.errors import LuthierError

app = typer.Typer(
    name="luthier",
    help="Fine-tuning jobs as an API, with the weights in your own hands.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


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


app.command()(chat)


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


app.command()(check)
app.command()(usage)
for name, commands in {
    "keys": keys_app,
    "bases": bases_app,
    "files": files_app,
    "jobs": jobs_app,
    "models": models_app,
    "aliases": aliases_app,
}.items():
    app.add_typer(commands, name=name)


def main() -> None:
    """Run the command line; an error that the user can correct is one line on stderr and exit code 1."""
    try:
        app()
    except LuthierError as error:
        print(f"luthier: {error.message}", file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
