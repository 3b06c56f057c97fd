"""The texts of `luthier jobs report` and `luthier jobs estimate`."""

import json
from typing import Any

from luthier.cli.output import four_decimals, print_table, printable, size

_SCORES = ("valid_loss", "valid_mean_token_accuracy", "general_loss", "forgetting")


def print_report(report: dict[str, Any]) -> None:
    """Print a job's report (GET …/jobs/{id}/report), and which parts of it do not exist yet."""
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
    # Reports of older versions have neither this nor `started_from`.
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
    if run.get("started_from"):
        print(f"started from: {printable(run['started_from']['name'])} ({run['started_from']['digest']})")
    print(
        f"steps: {run['steps_done']} of {run['steps_planned']}, result: {four_decimals(run['result_step'])}"
    )
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
        (evaluation["step"], *(four_decimals(evaluation[score]) for score in _SCORES))
        for evaluation in run["evaluations"]
    ]
    if run.get("base_evaluation"):
        rows.insert(0, ("base", *(four_decimals(run["base_evaluation"][score]) for score in _SCORES)))
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


def print_estimate(found: dict[str, Any]) -> None:
    """Print an estimate (POST …/jobs/estimate)."""
    rows = found["rows"]
    sampled = f", {rows['counted']} of them counted" if rows["is_sampled"] else ""
    print(f"rows: {rows['total']}{sampled}; {rows['train']} to train on, {rows['validation']} to validate on")
    print(
        f"tokens: {found['tokens']} an epoch ({found['supervised_tokens']} supervised), "
        f"{found['trained_tokens']} in {found['steps']} steps"
    )
    chosen = found["hyperparameters"] | {"learning_rate": found["training"]["learning_rate"]}
    print(f"hyperparameters: {printable(json.dumps(chosen))}")
    print(f"tuning: {printable(json.dumps(found['tuning']))}")
    print(f"trained parameters: {found['num_trained_parameters']}, artifact: {size(found['artifact_bytes'])}")
    seconds, basis = found["seconds"], found["basis"]
    if seconds is None:
        print(f"seconds and memory are not known. {printable(found['reason'])}")
    else:
        phases = ", ".join(f"{name} {spent:.1f}" for name, spent in seconds.items() if name != "total")
        print(f"seconds: {seconds['total']:.1f} ({phases}); memory: {size(found['peak_memory_bytes'])}")
        jobs = basis["finished_jobs"]
        grounds = f"{jobs} finished job{'s' * (jobs != 1)}" if jobs else "a measured product, no job yet"
        print(
            f"by {grounds} on {printable(basis['device'])} in {printable(basis['precision'])} with "
            f"{basis['num_threads']} threads"
        )
    for warning in found["warnings"]:
        print(f"warning: {printable(warning)}")
