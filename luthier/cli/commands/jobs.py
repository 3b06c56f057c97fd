"""`luthier jobs`: make, list, follow, pause, resume, cancel, estimate and report on fine-tuning jobs."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from luthier.cli.options import Home, Json, client_command, command_line
from luthier.cli.output import Columns, four_decimals, local_time, print_json, print_list, print_object
from luthier.core.errors import InvalidValueError

if TYPE_CHECKING:
    from luthier.client import LuthierClient

jobs_app = typer.Typer(
    help="Make, list, follow, pause, resume, cancel, estimate and report on fine-tuning jobs.",
    no_args_is_help=True,
)

JobId = Annotated[str, typer.Argument(metavar="ID")]
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

# Values of `method.type`; any other word is a `tuning.type`.
_OBJECTIVES = {"supervised", "dpo"}


@client_command(jobs_app, "create")
def create_job(
    client: "LuthierClient",
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
    as_json: Json = False,
) -> None:
    """Upload a training file and make a job of it."""
    from luthier.cli.commands.follow import follow
    from luthier.cli.commands.resources import uploaded_id

    body = job_body(model, method=method, tuning=tuning, training=training, hyperparameters=hyperparameters)
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
        raise typer.Exit(follow(client, job["id"], as_json=as_json, home=home))
    print("Follow it:", command_line(f"luthier jobs follow {job['id']}", home))


@client_command(jobs_app, "checkpoints")
def list_checkpoints(client: "LuthierClient", job_id: JobId, as_json: Json = False) -> None:
    """List a job's checkpoints, which are callable by name."""
    columns: Columns = {
        "STEP": "step_number",
        "MODEL": "fine_tuned_model_checkpoint",
        "TRAINING LOSS": lambda checkpoint: four_decimals(checkpoint["metrics"].get("train_loss")),
        "VALIDATION LOSS": lambda checkpoint: four_decimals(checkpoint["metrics"].get("full_valid_loss")),
    }
    checkpoints = client.list_checkpoints(job_id)
    print_list(checkpoints, columns, empty="The job has no checkpoints yet.", as_json=as_json)


@client_command(jobs_app, "list")
def list_jobs(
    client: "LuthierClient",
    limit: Annotated[int, typer.Option(min=1, max=100)] = 20,
    as_json: Json = False,
) -> None:
    """List the newest jobs."""
    columns: Columns = {"ID": "id", "STATUS": "status", "BASE": "model", "MODEL": "fine_tuned_model"}
    columns |= {"CREATED": ("created_at", local_time)}
    print_list(client.list_jobs(limit=limit), columns, empty="There are no jobs.", as_json=as_json)


@client_command(jobs_app, "follow")
def follow_job(client: "LuthierClient", job_id: JobId, home: Home = None, as_json: Json = False) -> None:
    """Show a job's progress until it ends; exit code 0 when it succeeded. Ctrl-C leaves the job running."""
    from luthier.cli.commands.follow import follow

    raise typer.Exit(follow(client, job_id, as_json=as_json, home=home))


@client_command(jobs_app, "cancel")
def cancel_job(client: "LuthierClient", job_id: JobId, as_json: Json = False) -> None:
    """Cancel a job that has not ended; checkpoints it has published stay callable."""
    _print_status(client.cancel_job(job_id), as_json=as_json)


@client_command(jobs_app, "pause")
def pause_job(client: "LuthierClient", job_id: JobId, as_json: Json = False) -> None:
    """Pause a job that is queued or running; it keeps its work and gives its place to others."""
    _print_status(client.pause_job(job_id), as_json=as_json)


@client_command(jobs_app, "resume")
def resume_job(client: "LuthierClient", job_id: JobId, as_json: Json = False) -> None:
    """Resume a paused job from where it stopped."""
    _print_status(client.resume_job(job_id), as_json=as_json)


def _print_status(job: dict[str, Any], *, as_json: bool) -> None:
    print_object(job, f"{job['id']} is {job['status']}.", as_json=as_json)


@client_command(jobs_app, "estimate")
def estimate_job(
    client: "LuthierClient",
    training_file: Annotated[str, typer.Argument(metavar="FILE_ID", help="An uploaded training file.")],
    model: Model,
    method: Method = None,
    tuning: Tuning = None,
    training: Training = None,
    hyperparameters: Hyperparameters = None,
    as_json: Json = False,
) -> None:
    """Show what a job would take, without making it."""
    from luthier.cli.commands.reports import print_estimate

    body = job_body(model, method=method, tuning=tuning, training=training, hyperparameters=hyperparameters)
    found = client.estimate_job(body | {"training_file": training_file})
    (print_json if as_json else print_estimate)(found)


@client_command(jobs_app, "report")
def report_job(client: "LuthierClient", job_id: JobId, as_json: Json = False) -> None:
    """Show what a job's files held, how its training went and what it cost."""
    from luthier.cli.commands.reports import print_report

    (print_json if as_json else print_report)(client.get_report(job_id))


def job_body(
    model: str,
    *,
    method: str | None,
    tuning: str | None,
    training: str | None,
    hyperparameters: str | None,
) -> dict[str, Any]:
    """Return the body of a create or an estimate, its files still to be named.

    Args:
        method: a way to tune, an objective, or a JSON object.

    Raises:
        InvalidValueError: when an option is no JSON object, or `method` and `tuning` name two ways to tune.
    """
    body: dict[str, Any] = {"model": model}
    texts = {"tuning": tuning, "training": training, "hyperparameters": hyperparameters}
    body |= {name: _read_object(name, text) for name, text in texts.items() if text is not None}
    if method is None:
        return body
    if method.lstrip().startswith("{"):
        return body | {"method": _read_object("method", method)}
    if method in _OBJECTIVES:
        return body | {"method": {"type": method}}
    named = body.get("tuning", {}).get("type", method)
    if named != method:
        raise InvalidValueError(f"--method says {method}, --tuning says {named}. Name one.", param="method")
    return body | {"tuning": {**body.get("tuning", {}), "type": method}}


def _read_object(option: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidValueError(f"--{option} is no JSON: {error}", param=option) from error
    if not isinstance(value, dict):
        raise InvalidValueError(
            f'--{option} must be a JSON object, such as {{"type": "lora"}}.', param=option
        )
    return value
