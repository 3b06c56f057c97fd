"""The measured cells as one Markdown table, and its place in docs/methods.md."""

import statistics
from pathlib import Path
from typing import Any

from benchmarks.quality.recipes import AUTO
from benchmarks.quality.results import Results, Size

BEGIN, END = "<!-- measured table: begin -->", "<!-- measured table: end -->"
NOT_MEASURED = "Not measured yet."

# The metrics of each task, the compared one first.
METRICS = {"e2e": ("bleu", "chrf"), "routing": ("accuracy",), "orders": ("fields", "exact", "valid")}
_TITLES = {"e2e": "E2E text", "routing": "routing, 8 labels", "orders": "orders, strict JSON"}
_NAMES = {
    "bleu": "BLEU",
    "chrf": "chrF",
    "accuracy": "accuracy %",
    "fields": "fields right %",
    "exact": "all right %",
    "valid": "valid %",
}
_HEADER = (
    "task",
    "model",
    "quality, mean (least to most over seeds)",
    "the same with hand-set recipes",
    "forgetting, nats",
    "trained parameters",
    "artifact",
    "training, processor s",
    "peak memory",
)

Entry = dict[str, Any]


def render(results: Results, size: Size, methods: list[str], absent: frozenset[str] = frozenset()) -> str:
    """Return the table.

    Args:
        results: what was measured.
        size: which measurement.
        methods: names of the methods, in the table's order.
        absent: tasks whose data set was not there.

    Returns:
        Markdown: a sentence on how it was measured, and the table.
    """
    entries = results.of_size(size)
    if not entries:
        return NOT_MEASURED
    lines = [_preamble(size, entries), "", _line(_HEADER), _line(["---"] * len(_HEADER))]
    for task in METRICS:
        of_task = [entry for entry in entries if entry["task"] == task]
        if not of_task:
            why = "data set absent" if task in absent else "not measured"
            lines.append(_line([_TITLES[task], why, *[""] * (len(_HEADER) - 2)]))
        for shots in ("0-shot", "4-shot"):
            shown = _matching(of_task, "base", shots)
            if shown:
                label = f"base, {shots[0]} examples in the prompt"
                lines.append(_line([_TITLES[task], label, _quality(task, shown), *[""] * (len(_HEADER) - 3)]))
        for method in methods:
            automatic = _matching(of_task, method, AUTO)
            if automatic:
                lines.append(_line([_TITLES[task], method, *_method_cells(task, automatic, of_task)]))
    return "\n".join(lines)


def write_into(document: Path, table: str) -> None:
    """Put a table between the two marks of a document.

    Args:
        document: Markdown with both marks, each once.
        table: what is put between them.
    """
    text = document.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise SystemExit(f"{document} must hold {BEGIN} and then {END}, each once.")
    before, after = text[: text.index(BEGIN)], text[text.index(END) :]
    document.write_text(f"{before}{BEGIN}\n\n{table}\n\n{after}", encoding="utf-8")


def _preamble(size: Size, entries: list[Entry]) -> str:
    seeds = sorted({entry["seed"] for entry in entries if entry["model"] != "base"})
    epochs = 'epochs by "auto"' if size.epochs is None else f"{size.epochs} epochs"
    return (
        f"{size.rows} training rows and {size.questions} held-out questions a task, {epochs}, "
        f"seeds {', '.join(map(str, seeds)) or 'none'}; base {entries[0]['machine']['base']}. "
        f"Measured on {_machines(entries)}. "
        'Answers are greedy. Recipes run for the epochs and batch size that "auto" took.'
    )


def _machines(entries: list[Entry]) -> str:
    """Say which tasks' cells were measured where; costs of tasks on different machines don't compare."""
    reported: dict[str, set[str]] = {}
    for entry in entries:
        machine = entry["machine"]
        name = f"{machine['processor']}, {machine['num_threads']} threads (CPU)"
        reported.setdefault(name, set()).add(entry["task"])
    return "; ".join(
        f"{name}: {' and '.join(_TITLES[task] for task in METRICS if task in tasks)}"
        for name, tasks in sorted(reported.items())
    )


def _matching(entries: list[Entry], model: str, recipe: str) -> list[Entry]:
    return [entry for entry in entries if entry["model"] == model and entry["recipe"] == recipe]


def _method_cells(task: str, automatic: list[Entry], of_task: list[Entry]) -> list[str]:
    method = automatic[0]["model"]
    return [
        _quality(task, automatic),
        _recipes(task, [entry for entry in of_task if entry["model"] == method and entry["recipe"] != AUTO]),
        _mean(automatic, "forgetting", "{:+.3f}"),
        _mean(automatic, "num_parameters", "{:,.0f}"),
        _bytes(_numbers(automatic, "artifact_bytes")),
        _mean(automatic, "processor_seconds", "{:.0f}"),
        _bytes(_numbers(automatic, "peak_memory_bytes")),
    ]


def _quality(task: str, entries: list[Entry]) -> str:
    scored = [entry["scores"] for entry in entries if "scores" in entry]
    if not scored:
        return "diverged"
    shown = []
    for metric in METRICS[task]:
        values = [scores[metric] for scores in scored]
        spread = f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else ""
        shown.append(f"{_NAMES[metric]} {statistics.fmean(values):.1f}{spread}")
    if len(scored) < len(entries):
        shown.append(f"diverged {len(entries) - len(scored)} times")
    return "; ".join(shown)


def _recipes(task: str, entries: list[Entry]) -> str:
    """Return the compared score of every recipe, the best one bold."""
    means: dict[str, float | None] = {}
    for name in dict.fromkeys(entry["recipe"] for entry in entries):
        values = [e["scores"][METRICS[task][0]] for e in entries if e["recipe"] == name and "scores" in e]
        means[name] = statistics.fmean(values) if values else None
    best = max((value for value in means.values() if value is not None), default=None)
    shown = []
    for name, value in means.items():
        text = f"{name} diverged" if value is None else f"{name} {value:.1f}"
        shown.append(f"**{text}**" if value is not None and value == best else text)
    return "; ".join(shown)


def _numbers(entries: list[Entry], name: str) -> list[float]:
    return [entry[name] for entry in entries if entry.get(name) is not None]


def _mean(entries: list[Entry], name: str, form: str) -> str:
    values = _numbers(entries, name)
    return form.format(statistics.fmean(values)) if values else ""


def _bytes(values: list[float]) -> str:
    if not values:
        return ""
    mean = statistics.fmean(values)
    return f"{mean / 1e6:,.0f} MB" if mean >= 1e7 else f"{mean / 1e3:,.0f} kB"


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
