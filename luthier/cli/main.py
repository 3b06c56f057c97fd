"""The command `luthier`: its commands and entry point. Heavy imports are inside the commands."""

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.commands.jobs import jobs_app
from luthier.cli.commands.resources import aliases_app, bases_app, files_app, keys_app, models_app
from luthier.cli.options import ApiKey, BaseUrl, Home, Json, client_command
from luthier.cli.output import print_json, print_table
from luthier.core.errors import InvalidFileFormatError, InvalidValueError, LuthierError

if TYPE_CHECKING:
    from luthier.client import LuthierClient

_DAY_SECONDS = 86400
_GROUPS = ("project_id", "api_key_id", "model")
_COUNTS = ("num_model_requests", "input_tokens", "input_cached_tokens", "output_tokens")

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


@client_command(app)
def chat(
    client: "LuthierClient",
    model: Annotated[str, typer.Argument(help="A base, a tuned model, a checkpoint or an alias.")],
    message: Annotated[str | None, typer.Argument(help="One message; without it, a conversation.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of an answer.", min=1)] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 for the likeliest answer.", min=0, max=2)
    ] = None,
) -> None:
    """Talk to a model; answers are printed as they come."""
    turns = [] if system is None else [{"role": "system", "content": system}]
    given = {"max_tokens": max_tokens, "temperature": temperature}
    parameters = {name: value for name, value in given.items() if value is not None}
    if message is not None:
        _answer(client, model, [*turns, {"role": "user", "content": message}], parameters)
        return
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        print("A line is a message; Ctrl-D ends.")
    while True:
        try:
            line = input("> " if is_terminal else "").strip()
        except EOFError:
            return
        if line:
            turns.append({"role": "user", "content": line})
            turns.append({"role": "assistant", "content": _answer(client, model, turns, parameters)})


def _answer(
    client: "LuthierClient", model: str, turns: list[dict[str, str]], parameters: dict[str, Any]
) -> str:
    answer = ""
    for piece in client.stream_chat({"model": model, "messages": turns, **parameters}):
        print(_escape_controls(piece), end="", flush=True)
        answer += piece
    print()
    return answer


def _escape_controls(text: str) -> str:
    return "".join(
        character if character.isprintable() or character in "\n\t" else repr(character)[1:-1]
        for character in text
    )


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
    from luthier.cli.doctor import run_doctor
    from luthier.cli.stack.home import resolve_home

    raise typer.Exit(run_doctor(resolve_home(home), base_url=base_url, api_key=api_key, as_json=as_json))


@app.command()
def check(file: Annotated[Path, typer.Argument(help="Training file, one JSON object a line.")]) -> None:
    """Check a training file's format on this machine, before any upload."""
    from luthier.cli.settings import read_settings
    from luthier.core.specs import MIN_TRAINING_ROWS
    from luthier.data.readers.file_checker import MAX_FAULTS, check_rows
    from luthier.data.readers.file_rows import read_chunks
    from luthier.data.readers.upload_check import row_limits
    from luthier.storage.manifests import file_sha256

    try:
        sha256 = file_sha256(file)
        facts = check_rows(read_chunks(file), row_limits(read_settings()), file)
    except OSError as error:
        raise InvalidValueError(f"{file} can't be read: {error.strerror}.") from error
    except InvalidFileFormatError as error:
        if len(error.faults) < 2:
            raise
        count = f"{MAX_FAULTS} or more" if len(error.faults) == MAX_FAULTS else len(error.faults)
        listed = "\n".join(error.faults)
        raise InvalidFileFormatError(
            f"{file} breaks the format in {count} places:\n{listed}", param="file"
        ) from error
    print(
        f"{file}: {facts.num_rows} rows of the format {facts.format} in {facts.container}, "
        f"{facts.num_bytes} bytes, sha256 {sha256}"
    )
    if facts.num_rows < MIN_TRAINING_ROWS:
        print(
            f"These are too few to train on: a job needs at least {MIN_TRAINING_ROWS} rows. As a validation "
            "file it will do."
        )


@client_command(app)
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
