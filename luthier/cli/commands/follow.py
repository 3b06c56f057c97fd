"""`luthier jobs follow`: a job's live events as a progress bar, plain lines, or JSON lines."""

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from luthier.cli.options import command_line
from luthier.cli.output import local_time, printable
from luthier.client import LuthierClient


def follow(client: LuthierClient, job_id: str, *, as_json: bool, home: Path | None = None) -> int:
    """Print a job's events until it ends, and return the exit code: 0 when it succeeded, else 1.

    Args:
        home: the home that the user named, which the commands in the output then name too.
    """
    events = client.follow_events(job_id)
    if as_json:
        for event in events:
            print(json.dumps(event, ensure_ascii=False), flush=True)
    elif sys.stdout.isatty():
        _show_progress(events, job_id)
    else:
        for event in thinned(events):
            print(event_line(event), flush=True)
    job = client.get_job(job_id)
    if not as_json:
        print(outcome_line(job, home))
    return 0 if job["status"] == "succeeded" else 1


def thinned(events: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield the first step, the last one, and about 20 between them; every event of another kind."""
    next_step = 0
    for event in events:
        metrics = _metrics(event)
        if "step" in metrics and "total_steps" in metrics:
            step, total = metrics["step"], metrics["total_steps"]
            if next_step > step != total:
                continue
            next_step = step + max(1, total // 20)
        yield event


def event_line(event: dict[str, Any]) -> str:
    """Return one event as one line."""
    parts = [local_time(event.get("created_at")), printable(event.get("message", ""))]
    metrics = _metrics(event)
    if "tokens_per_second" in metrics:
        parts.append(f"{metrics['tokens_per_second']:.0f} tokens/s")
    if "seconds_left" in metrics:
        parts.append(f"{duration(metrics['seconds_left'])} left")
    if event.get("level") in {"warn", "error"}:
        parts.insert(1, event["level"].upper())
    return "  ".join(parts)


def outcome_line(job: dict[str, Any], home: Path | None = None) -> str:
    """Return how a job ended, and its model or its error."""
    if job["status"] == "succeeded":
        name = printable(job.get("fine_tuned_model"))
        return f"Succeeded: {name}\nTalk to it: {command_line(f'luthier chat {name}', home)}"
    error = job.get("error") or {}
    reason = (
        f" ({printable(error.get('code'))}): {printable(error.get('message'))}" if error.get("code") else ""
    )
    return f"{str(job['status']).capitalize()}{reason}"


def duration(seconds: float) -> str:
    """Return a length of time such as `1:02:03` or `2:03`."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _metrics(event: dict[str, Any]) -> dict[str, Any]:
    data = event.get("data")
    return data if event.get("type") == "metrics" and isinstance(data, dict) else {}


def _show_progress(events: Iterator[dict[str, Any]], job_id: str) -> None:
    from rich.progress import BarColumn, Progress, TextColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
        TextColumn("loss {task.fields[loss]}"),
        TextColumn("{task.fields[speed]} tokens/s"),
        TextColumn("{task.fields[left]} left"),
    )
    with Progress(*columns) as progress:
        bar = progress.add_task(job_id, total=1, visible=False, loss="-", speed="-", left="-")
        for event in events:
            metrics = _metrics(event)
            if "step" not in metrics or "total_steps" not in metrics:
                progress.console.print(event_line(event), markup=False, highlight=False)
                continue
            progress.update(
                bar,
                visible=True,
                total=metrics["total_steps"],
                completed=metrics["step"],
                loss=_number(metrics.get("train_loss"), ".3f"),
                speed=_number(metrics.get("tokens_per_second"), ".0f"),
                left=duration(metrics["seconds_left"]) if "seconds_left" in metrics else "-",
            )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
