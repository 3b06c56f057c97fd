"""The table that a person reads, in Markdown."""

from typing import Any

from benchmarks.results_file import code_digest, job_digest
from benchmarks.train.rows import GROWTH, ROWS, SHORT_JOB

_HEADER = (
    "| row | ours, tokens/s | peer, tokens/s | peer's best settings | times faster (95 %) | bar "
    "| memory ours / peer, MB | times (bar) | work of whole rows by the bf16 GEMM peak, ours / peer "
    "| loss gap, mean / largest; mean of ours / the peer's to float32 | stolen |"
)


def make_table(content: dict[str, Any]) -> str:
    """Return what a results file holds as Markdown.

    Args:
        content: of the file.

    Returns:
        The machine, a line a row, what the other measurements found, and how each peer's settings did.
    """
    machine, rows = content["machine"], content["rows"]
    lines = [
        f"Measured on {machine['device']}: {machine['processor']}, {machine['num_cores']} cores, "
        f"{machine['memory_gib']} GiB, torch {machine['torch']}.",
        "",
        _HEADER,
        "|" + "---|" * (_HEADER.count("|") - 1),
    ]
    lines += [_row_line(name, rows[name]) for name in ROWS if name in rows]
    if SHORT_JOB in rows:
        lines += ["", *_short_job_lines(rows[SHORT_JOB])]
    if GROWTH in rows and "summary" in rows[GROWTH]:
        lines += ["", *_growth_lines(rows[GROWTH])]
    lines += ["", "Every setting of every peer, one run each:", ""]
    lines += [
        line for name in [*ROWS, SHORT_JOB] if name in rows for line in _variant_lines(name, rows[name])
    ]
    return "\n".join(lines) + "\n"


def _label(name: str, found: dict[str, Any], code: str) -> str:
    return name if found["code"] == code else f"{name} (of older code)"


def _row_line(name: str, found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"| {name} | | | | does not run here: {found['failed']} " + "| " * 7 + "|"
    if "summary" not in found:
        return f"| {name} | not finished " + "| " * 9 + "|"
    summary = found["summary"]
    speed, ratio = summary["tokens_per_second"], summary["ratio"]
    memory, share = summary["memory_bytes"], summary["gemm_roofline_share"]
    losses = summary["losses"]
    bar = "" if summary["memory_bar"] is None else f" ({summary['memory_bar']})"
    cells = [
        _label(name, found, code_digest()),
        f"{speed['ours']:.0f}",
        f"{speed['peer']:.0f}" + ("" if summary["has_equal_tokens"] else " (unequal tokens!)"),
        summary["peer_variant"],
        f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
        f"{summary['bar']:g} {'met' if summary['is_above_bar'] else 'missed'}",
        f"{memory['ours'] / 1e6:.0f} / {memory['peer'] / 1e6:.0f}",
        f"{summary['memory_ratio']['median']:.2f}{bar}",
        f"{100 * share['ours']:.0f} % / {100 * share['peer']:.0f} % of "
        f"{summary['gemm_gflops']['bfloat16']:.0f} GFLOP/s",
        _losses(losses),
        f"{100 * summary['stolen_share']:.1f} %",
    ]
    return "| " + " | ".join(cells) + " |"


def _losses(losses: dict[str, Any]) -> str:
    if "mean_gap" not in losses:
        return f"means {losses['ours_mean']:.2f} / {losses['peer_mean']:.2f}"
    reported = f"{losses['mean_gap']:.3f} / {losses['largest_gap']:.3f}"
    # Rows of before there was a float32 run beside them.
    exact = losses.get("gap_to_exact")
    if exact is not None:
        reported += f"; to float32 {exact['ours']:.3f} / {exact['peer']:.3f}"
    return reported if losses["agree"] or losses.get("is_exact") else reported + " (differs!)"


def _short_job_lines(found: dict[str, Any]) -> list[str]:
    if "summary" not in found:
        return [f"Short job: {found.get('failed', 'not finished')}."]
    summary = found["summary"]
    seconds, ratio = summary["total_seconds"], summary["ratio"]
    label, num_rows = _label("Short job", found, job_digest()), found["workload"]["rows"]
    return [
        f"{label} of {num_rows} rows, upload to first token: {seconds['ours']:.1f} s; "
        f"TRL's script ({summary['peer_variant']}), start to saved adapter: {seconds['peer']:.1f} s; "
        f"{ratio['median']:.2f} times ({ratio['low']:.2f} to {ratio['high']:.2f}), bar {summary['bar']:g}."
    ]


def _growth_lines(found: dict[str, Any]) -> list[str]:
    summary = found["summary"]
    label, largest = _label("Growth", found, code_digest()), summary["largest_step_tokens"]
    return [
        f"{label}: ten times the rows takes {summary['rows_x10_seconds_per_token_ratio']:.3f} times the "
        f"seconds a token and {summary['rows_x10_memory_ratio']:.3f} times the memory (largest steps of "
        f"{largest['rows x10']} and {largest['rows x1']} tokens); rows of four times the length take "
        f"{100 * summary['length_x4_gap']:+.1f} % beside a T + b T^2 fitted on three lengths "
        f"(a {summary['fit']['a']:.3g}, b {summary['fit']['b']:.3g}): "
        f"{'within the bars' if summary['is_within_bars'] else 'outside the bars'}."
    ]


def _variant_lines(name: str, found: dict[str, Any]) -> list[str]:
    lines = []
    for variant, reported in found.get("variants", {}).items():
        if "failed" in reported:
            lines.append(f"- {name}, {variant}: fails: {reported['failed']}")
            continue
        lines.append(
            f"- {name}, {variant}: {reported['num_tokens'] / reported['seconds']:.0f} tokens/s, "
            f"{reported['memory_bytes'] / 1e6:.0f} MB"
        )
    return lines
