"""The command `luthier`: its commands and options. What a command needs is imported when it runs."""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="luthier",
    help="Fine-tuning jobs as an API, with the weights in your own hands.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def version() -> None:
    """Print the version."""
    import importlib.metadata

    print(importlib.metadata.version("luthier"))


@app.command()
def up(
    home: Annotated[Path | None, typer.Option(help="Folder of all state; else $LUTHIER_HOME.")] = None,
    port: Annotated[int, typer.Option(help="Port of the API.", min=1, max=65535)] = 8000,
    host: Annotated[str, typer.Option(help="Address that the API binds.")] = "127.0.0.1",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "",
) -> None:
    """Run the whole service in the foreground until Ctrl-C."""
    from luthier.cli.stack.home import resolve_home
    from luthier.cli.stack.up import read_settings
    from luthier.cli.stack.up import up as run_up

    run_up(resolve_home(home), host=host, port=port, settings=read_settings(log_level))


def main() -> None:
    """Run the command line; a failure that a user can mend is one line on standard error and exit code 1."""
    from luthier.core.errors import LuthierError

    try:
        app()
    except LuthierError as error:
        print(f"luthier: {error.message}", file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
