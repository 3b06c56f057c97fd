"""`luthier jobs`: make, list, follow, pause, resume, cancel, estimate and report on fine-tuning jobs."""

from typing import Annotated, Any

import typer

from luthier.cli import options
from luthier.cli.options import ApiKey, BaseUrl, Home, Json

jobs_app = typer.Typer(
    help="Make, list, follow, pause, resume, cancel, estimate and report on fine-tuning jobs.",
    no_args_is_help=True,
)

Model = Annotated[str, typer.Option(help="Base to tune, or a tuned model to continue from.")]
Method = Annotated[
    str | None,
    typer.Option(
        help="lora, prefix, prompt, adapter or full; dpo for preferences; or the request's `method` as JSON."
    ),
]
Tuning = Annotated[str | None, typer.Option(help="The request's `tuning` as JSON.")]
Training = Annotated[str | None, typer.Option(help="The request's `training` as JSON.")]
Hyperparameters = Annotated[str | None, typer.Option(help="The request's `hyperparameters` as JSON.")]


@jobs_app.command("create")
def create_job(
    file: Annotated[
        str, typer.Argument(help="A training file on this machine, or the id of an uploaded one.")
    ],
    model: Model,
    method: Method = None,
    tuning: Tuning = None,
    training: Training = None,
    hyperparameters: Hyperparameters = None,
    validation_file: Annotated[str | None, typer.Option(help="As FILE, to validate on.")] = None,
    suffix: Annotated[str | None, typer.Option(help="Part of the tuned model's name.")] = None,
    is_followed: Annotated[bool, typer.Option("--follow", help="Show its progress until it ends.")] = False,
    home: Home = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Upload a training file and make a job of it."""
    from luthier.cli.commands.files import uploaded_id
    from luthier.cli.commands.follow import follow
    from luthier.cli.commands.job_request import job_body
    from luthier.cli.output import print_json

    body = job_body(model, method=method, tuning=tuning, training=training, hyperparameters=hyperparameters)
    with options.open_client(base_url, api_key, home) as client:
        body["training_file"] = uploaded_id(client, file, is_quiet=as_json)
        if validation_file is not None:
            body["validation_file"] = uploaded_id(client, validation_file, is_quiet=as_json)
        if suffix is not None:
            body["suffix"] = suffix
        job = client.create_job(body)
        if as_json and not is_followed:
            print_json(job)
            return
        if not as_json:
            print(f"Job {job['id']} on {job['model']}")
        if is_followed:
            raise typer.Exit(follow(client, job["id"], as_json=as_json))
        print(f"Follow it: luthier jobs follow {job['id']}")


@jobs_app.command("checkpoints")
def list_checkpoints(
    job_id: Annotated[str, typer.Argument(metavar="ID")],
    home: Home = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """List a job's checkpoints, which are callable by name."""
    from luthier.cli.output import print_json, print_table

    with options.open_client(base_url, api_key, home) as client:
        checkpoints = client.list_checkpoints(job_id)
    if as_json:
        print_json(checkpoints)
        return
    rows = [
        (
            checkpoint["step_number"],
            checkpoint["fine_tuned_model_checkpoint"],
            *(_score(checkpoint["metrics"], name) for name in ("train_loss", "full_valid_loss")),
        )
        for checkpoint in checkpoints
    ]
    titles = ("STEP", "MODEL", "TRAINING LOSS", "VALIDATION LOSS")
    print_table(titles, rows, empty="The job has no checkpoints yet.")


def _score(metrics: dict[str, Any], name: str) -> str:
    value = metrics.get(name)
    return "-" if value is None else f"{value:.4f}"


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
    from luthier.cli.commands.follow import follow

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
    model: Model,
    method: Method = None,
    tuning: Tuning = None,
    training: Training = None,
    hyperparameters: Hyperparameters = None,
    home: Home = None,
    base_url: BaseUrl = None,
    api_key: ApiKey = None,
    as_json: Json = False,
) -> None:
    """Show what a job would take, without making it."""
    from luthier.cli.commands.estimate import print_estimate
    from luthier.cli.commands.job_request import job_body
    from luthier.cli.output import print_json

    body = job_body(model, method=method, tuning=tuning, training=training, hyperparameters=hyperparameters)
    body["training_file"] = training_file
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
    from luthier.cli.commands.report import print_report
    from luthier.cli.output import print_json

    with options.open_client(base_url, api_key, home) as client:
        report = client.get_report(job_id)
    if as_json:
        print_json(report)
        return
    print_report(report)
