"""`luthier jobs report`: what a job's files held, its scores step by step, what it cost."""

from typing import Any

from luthier.cli.output import print_table, printable, size

_SCORES = ("valid_loss", "valid_mean_token_accuracy", "general_loss", "forgetting")


def print_report(report: dict[str, Any]) -> None:
    """Print a report as of GET …/jobs/{id}/report for a person; parts that aren't there yet are said so."""
    prepare, run = report["prepare"], report["run"]
    if prepare is None:
        print("The job's files are not prepared yet.")
        return
    for name in ("training", "validation"):
        if prepare[name] is not None:
            file = prepare[name]
            print(
                f"{name} file: {file['num_rows']} rows, {file['num_tokens']} tokens, "
                f"{file['num_supervised_tokens']} supervised, {file['num_truncated']} rows truncated, "
                f"{file['num_dropped']} dropped"
            )
    # A report of an older version has no such member.
    if prepare.get("num_validation_rows") is not None:
        print(
            f"rows: {prepare['num_train_rows']} to train on, {prepare['num_validation_rows']} to validate on"
        )
    if run is None:
        print("Training has not been scored yet.")
        return
    print(
        f"{printable(run['method'])}: {run['num_trained_parameters']} of {run['num_base_parameters']} "
        f"parameters trained, {printable(run['precision'])} on {printable(run['device'])}"
    )
    # A report of an older version has no such member.
    if run.get("started_from"):
        print(f"started from: {printable(run['started_from']['name'])} ({run['started_from']['digest']})")
    print(f"steps: {run['steps_done']} of {run['steps_planned']}, result: {_cell(run['result_step'])}")
    if run["stopped_early"]:
        print(printable(run["stopped_early"]))
    seconds = ", ".join(f"{name} {spent:.1f}" for name, spent in run["seconds"].items())
    print(f"seconds: {seconds}")
    print(f"artifact: {size(run['artifact_bytes'])}, a full copy: {size(run['full_copy_bytes'])}, ", end="")
    print(f"peak memory: {size(run['peak_memory_bytes'])}")
    print(
        f"seed: {run['seed']}; SHA-256 of the base: {run['base_digest']}, of the rows: {run['data_sha256']}\n"
    )
    rows = [
        (evaluation["step"], *(_cell(evaluation[score]) for score in _SCORES))
        for evaluation in run["evaluations"]
    ]
    if run.get("base_evaluation"):
        rows.insert(0, ("base", *(_cell(run["base_evaluation"][score]) for score in _SCORES)))
    titles = ("STEP", "VALIDATION LOSS", "ACCURACY", "GENERAL LOSS", "FORGETTING")
    print_table(titles, rows, empty="Nothing was evaluated.")
    _print_answers(run["evaluations"])


def _print_answers(evaluations: list[dict[str, Any]]) -> None:
    answered = [evaluation for evaluation in evaluations if evaluation["answers"]]
    if not answered:
        return
    for place, first in enumerate(answered[0]["answers"]):
        print(f"\n{printable(first['prompt'])}")
        for evaluation in answered:
            print(f"  step {evaluation['step']}: {printable(evaluation['answers'][place]['answer'])}")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
