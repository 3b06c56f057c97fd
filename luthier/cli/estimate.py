"""`luthier jobs estimate`: what a job would take, before it is made."""

import json
from typing import Any

from luthier.cli.output import printable
from luthier.core.errors import InvalidValueError


def read_object(option: str, text: str | None) -> dict[str, Any] | None:
    """Read an option that holds a JSON object.

    Returns:
        The object, None when nothing was given.

    Raises:
        InvalidValueError: when it is no JSON object.
    """
    if text is None:
        return None
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidValueError(f"--{option} is no JSON: {error}", param=option) from error
    if not isinstance(value, dict):
        raise InvalidValueError(
            f'--{option} must be a JSON object, such as {{"type": "lora"}}.', param=option
        )
    return value


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
    print(
        f"trained parameters: {found['num_trained_parameters']}, artifact: {_size(found['artifact_bytes'])}"
    )
    seconds, calibration = found["seconds"], found["calibration"]
    if seconds is None:
        print(f"seconds and memory are not known. {printable(found['reason'])}")
    else:
        phases = ", ".join(f"{name} {spent:.1f}" for name, spent in seconds.items() if name != "total")
        print(f"seconds: {seconds['total']:.1f} ({phases}); memory: {_size(found['peak_memory_bytes'])}")
        print(
            f"as measured on {printable(calibration['hostname'])}: {printable(calibration['device'])}, "
            f"{printable(calibration['precision'])}, {calibration['num_threads']} threads"
        )
    for warning in found["warnings"]:
        print(f"warning: {printable(warning)}")


def _size(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / 1024**2:,.1f} MiB"
