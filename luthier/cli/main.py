"""The command `luthier`: its commands and options. What a command needs is imported when it runs."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from luthier.cli import options
from luthier.cli.aliases import aliases_app
from luthier.cli.models import models_app
from luthier.cli.options import ApiKey, BaseUrl, Home, Json
from luthier.core.errors import LuthierError

app = typer.Typer(
    name="luthier",
    help="Fine-tuning jobs as an API, with the weights in your own hands.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
keys_app = typer.Typer(help="Make, list and revoke API keys.", no_args_is_help=True)
bases_app = typer.Typer(help="List and fetch base models.", no_args_is_help=True)
jobs_app = typer.Typer(
    help="List, follow, pause, resume, cancel, estimate and report on fine-tuning jobs.", no_args_is_help=True
)
app.add_typer(keys_app, name="keys")
app.add_typer(bases_app, name="bases")
app.add_typer(jobs_app, name="jobs")
app.add_typer(models_app, name="models")
app.add_typer(aliases_app, name="aliases")


@app.command()
def version() -> None:
    """Print the version."""
    import importlib.metadata

    print(importlib.metadata.version("luthier"))


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
    from luthier.cli.check import check_file

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
    from luthier.cli.usage import show_usage

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
    from luthier.cli.bases import print_bases

    print_bases(as_json=as_json)


@bases_app.command("fetch")
def fetch_base(base_id: Annotated[str, typer.Argument(metavar="ID")]) -> None:
    """Fetch a base model, and convert and seal it where that is needed."""
    from luthier.cli.bases import fetch

    fetch(base_id)


@jobs_app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    home: Home = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """List the newest jobs."""
    from luthier.cli.output import local_time, print_json, print_table

    with options.open_client(base_url, api_key, home) as client:
        jobs = client.list_jobs(limit=limit)
    if as_json:
        print_json(jobs)
        return
    rows = [
        (
            job["id"],
            job["status"],
            job["model"],
            job.get("fine_tuned_model") or "-",
            local_time(job["created_at"]),
        )
        for job in jobs
    ]
    print_table(("ID", "STATUS", "BASE", "MODEL", "CREATED"), rows, empty="There are no jobs.")


@jobs_app.command("follow")
def follow_job(
    job_id: Annotated[str, typer.Argument(metavar="ID")],
    home: Home = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Show a job's progress until it ends; exit code 0 when it succeeded. Ctrl-C leaves the job running."""
    from luthier.cli.follow import follow

    with options.open_client(base_url, api_key, home) as client:
        raise typer.Exit(follow(client, job_id, as_json=as_json))


@jobs_app.command("cancel")
def cancel_job(
    job_id: Annotated[str, typer.Argument(metavar="ID")],
    home: Home = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Cancel a job that has not ended; checkpoints it has published stay callable."""
    with options.open_client(base_url, api_key, home) as client:
        _print_status(client.cancel_job(job_id), as_json=as_json)


@jobs_app.command("pause")
def pause_job(
    job_id: Annotated[str, typer.Argument(metavar="ID")],
    home: Home = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Pause a job that is queued or running; it keeps its work and gives its place to others."""
    with options.open_client(base_url, api_key, home) as client:
        _print_status(client.pause_job(job_id), as_json=as_json)


@jobs_app.command("resume")
def resume_job(
    job_id: Annotated[str, typer.Argument(metavar="ID")],
    home: Home = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Let a paused job go on from where it stopped."""
    with options.open_client(base_url, api_key, home) as client:
        _print_status(client.resume_job(job_id), as_json=as_json)


def _print_status(job: dict[str, Any], *, as_json: bool) -> None:
    from luthier.cli.output import print_json

    if as_json:
        print_json(job)
        return
    print(f"{job['id']} is {job['status']}.")


@jobs_app.command("estimate")
def estimate_job(
    training_file: Annotated[str, typer.Argument(metavar="FILE_ID", help="An uploaded training file.")],
    model: Annotated[str, typer.Option(help="Base to tune.")],
    tuning: Annotated[str | None, typer.Option(help="The request's `tuning`, as JSON.")] = None,
    training: Annotated[str | None, typer.Option(help="The request's `training`, as JSON.")] = None,
    hyperparameters: Annotated[str | None, typer.Option(help="The same of `hyperparameters`.")] = None,
    method: Annotated[str | None, typer.Option(help='The same of `method`, as {"type": "dpo"}.')] = None,
    home: Home = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Tell what a job would take, without making it."""
    from luthier.cli.estimate import print_estimate, read_object
    from luthier.cli.output import print_json

    objects = {
        "tuning": tuning,
        "training": training,
        "hyperparameters": hyperparameters,
        "method": method,
    }
    body: dict[str, object] = {"model": model, "training_file": training_file}
    body |= {name: value for name, text in objects.items() if (value := read_object(name, text)) is not None}
    with options.open_client(base_url, api_key, home) as client:
        found = client.estimate_job(body)
    if as_json:
        print_json(found)
        return
    print_estimate(found)


@jobs_app.command("report")
def report_job(
    job_id: Annotated[str, typer.Argument(metavar="ID")],
    home: Home = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Show what a job's files held, how its training went and what it cost."""
    from luthier.cli.output import print_json
    from luthier.cli.report import print_report

    with options.open_client(base_url, api_key, home) as client:
        report = client.get_report(job_id)
    if as_json:
        print_json(report)
        return
    print_report(report)


def main() -> None:
    """Run the command line; a failure that a user can mend is one line on standard error and exit code 1."""
    try:
        app()
    except LuthierError as error:
        print(f"luthier: {error.message}", file=sys.stderr)
        raise SystemExit(1) from error


if __name__ == "__main__":
    main()
