"""`luthier jobs estimate`: what a job would take, before it is made."""

import json
from typing import Any

from luthier.cli.output import printable, size


def print_estimate(found: dict[str, Any]) -> None:
    """Print an estimate as of POST …/jobs/estimate for a person."""
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
