"""The table of serving that a person reads, in Markdown."""

from typing import Any

from benchmarks.results_file import code_digest
from benchmarks.serve.plan import STREAM_ROWS
from benchmarks.serve.rows import alias, churn, front, memory, prefill, publish

# What a measurement of serving depends on.
_CODE = ("luthier/methods", "luthier/modeling", "luthier/inference")
_HEADER = (
    "| row | ours, tokens/s | beside | its tokens/s | its best settings | ours times as fast (95 %) "
    "| first token equal / answer equal before it parts | share of the limit, ours / its |"
)
_MIB = 1024 * 1024


def make_table(content: dict[str, Any]) -> str:
    """Return what a results file holds as Markdown.

    Args:
        content: of the file.

    Returns:
        The machine, a line a peer and row, what the other rows found, and how each peer's settings did.
    """
    machine, rows = content["machine"], content["rows"]
    streams = {name: rows[name] for name in STREAM_ROWS if name in rows}
    lines = [
        f"Measured on {machine['device']}: {machine['processor']}, {machine['num_cores']} cores, "
        f"{machine['memory_gib']} GiB, torch {machine['torch']}.",
        "",
        _HEADER,
        "|" + "---|" * (_HEADER.count("|") - 1),
    ]
    for name, found in streams.items():
        lines += _stream_lines(_label(name, found), found)
    lines += ["", *(_limit_line(name, found) for name, found in streams.items() if "summary" in found)]
    for name, report in _OTHERS.items():
        if name in rows:
            reported = [f"failed: {rows[name]['failed']}"] if "failed" in rows[name] else report(rows[name])
            lines += ["", *(f"- {_label(name, rows[name])}: {line}" for line in reported)]
    lines += ["", "Every setting of every peer, one run each:", ""]
    lines += [line for name, found in streams.items() for line in _setting_lines(name, found)]
    return "\n".join(lines) + "\n"


def serving_code() -> str:
    """Name the code that decides a measurement of serving."""
    return code_digest(_CODE, left_out=())


def _label(name: str, found: dict[str, Any]) -> str:
    return name if found.get("code") == serving_code() else f"{name} (of older code, or not finished)"


def _stream_lines(label: str, found: dict[str, Any]) -> list[str]:
    if "summary" not in found:
        return [f"| {label} | {found.get('failed', 'not finished')} " + "| " * 6 + "|"]
    summary, lines = found["summary"], []
    shares, speeds = summary["share_of_limit"], summary["tokens_per_second"]
    ours = f"{speeds['ours']:.0f}" + ("" if summary["has_equal_tokens"] else " (unequal tokens!)")
    for name, ratio in summary["ratios"].items():
        peer = found["peers"].get(name, {"title": name, "best_setting": "", "in_process": False})
        agreed = summary["agreement"].get(name)
        cells = [
            label,
            ours,
            peer["title"] + (", in process" if peer["in_process"] else ""),
            f"{speeds[name]:.1f}",
            peer["best_setting"],
            f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})",
            ""
            if agreed is None
            else f"{100 * agreed['first_token']:.0f} % / {100 * agreed['leading']:.0f} %",
            f"{100 * shares['ours']['steps']:.0f} % / {100 * shares[name]['steps']:.0f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    for peer in found["peers"].values():
        if "failed" in peer:
            lines.append(
                f"| {label} | {ours} | {peer['title']} | does not run here: {peer['failed']} "
                + "| " * 4
                + "|"
            )
    return lines or [f"| {label} | {ours} | nobody " + "| " * 5 + "|"]


def _limit_line(name: str, found: dict[str, Any]) -> str:
    summary = found["summary"]
    limits, bounds, ours = summary["limits"], summary["limit_tokens_per_second"], summary["ours"]
    lengths = f"{found['num_prompt_tokens']} prompt tokens and {found['num_new_tokens']} new"
    parts = [
        f"{found['num_streams']} x ({lengths})",
        f"{summary['num_rounds']} rounds",
        f"limit of the steps {bounds['steps']:.0f} tokens/s (bytes {bounds['bytes']:.0f}, products "
        f"{bounds['products']:.0f}), of the run with its prompts {bounds['run']:.0f}, of which ours is "
        f"{100 * summary['share_of_limit']['ours']['run']:.0f} %",
        f"read {limits['read_gigabytes_per_second']:.0f} GB/s, copy "
        f"{limits['copy_gigabytes_per_second']:.0f} GB/s, bf16 GEMM {limits['gemm_bf16_gflops']:.0f} GFLOP/s",
        f"ours: first token {_ms(ours['first_token_seconds_p50'])}, between tokens "
        f"{_ms(ours['gap_seconds_p50'])} (p99 {_ms(ours['gap_seconds_p99'])})",
        f"stolen {100 * summary['stolen_share']:.1f} %",
    ]
    return f"- {name}: {'; '.join(parts)}."


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.0f} ms"


def _setting_lines(name: str, found: dict[str, Any]) -> list[str]:
    lines = []
    for peer, reported in found.get("peers", {}).items():
        for setting, one in reported["settings"].items():
            speed = (
                f"fails: {one['failed']}" if "failed" in one else f"{one['tokens_per_second']:.1f} tokens/s"
            )
            versions = ", ".join(f"{package} {number}" for package, number in one.get("versions", {}).items())
            lines.append(f"- {name}, {peer}, {setting}: {speed}" + (f" ({versions})" if versions else ""))
    return lines


def _milliseconds(seconds: dict[str, float]) -> str:
    return f"{1000 * seconds['p50']:.0f} ms (p99 {1000 * seconds['p99']:.0f})"


def _interval(ratio: dict[str, float], digits: int = 2) -> str:
    return f"{ratio['median']:.{digits}f} ({ratio['low']:.{digits}f} to {ratio['high']:.{digits}f})"


def _churn_lines(found: dict[str, Any]) -> list[str]:
    summary, lines = found["summary"], []
    if "added_seconds" in summary:
        lines.append(
            f"{found['num_models']} LoRA models; a cold one adds {_milliseconds(summary['added_seconds'])}."
        )
    for traffic in ("zipf", "uniform"):
        if traffic in summary:
            reported = summary[traffic]
            first = reported["first_token_seconds"]
            lines.append(
                f"{traffic} traffic, {reported['requests']} requests: {reported['failures']} failures, "
                f"{reported['requests_per_second']:.1f} requests/s, first token "
                f"{'none' if first is None else _milliseconds(first)}."
            )
    if "growth" in summary:
        points = (f"{one['registered']}: {_milliseconds(one['added_seconds'])}" for one in summary["growth"])
        lines.append(f"a cold model adds, by models registered and served: {'; '.join(points)}.")
    if "peer" in found:
        peer = found["peer"]
        if "failed" in peer:
            lines.append(f"{peer['title']} does not run here: {peer['failed']}")
        else:
            lines.append(
                f"{peer['title']} with {peer['num_loaded']} loaded adds {_interval(peer['ratio'])} times "
                "what ours does."
            )
    return lines


def _publish_lines(found: dict[str, Any]) -> list[str]:
    summary = found["summary"]
    return [
        f"publish to first token {1000 * summary['total_seconds']:.0f} ms (p99 {1000 * summary['p99']:.0f}): "
        f"{1000 * summary['publish_seconds']:.0f} ms to publish {summary['num_bytes'] / _MIB:.0f} MiB "
        f"durably, {1000 * summary['first_token_seconds']:.0f} ms from the request to the first token."
    ]


def _prefill_lines(found: dict[str, Any]) -> list[str]:
    summary = found["summary"]
    return [
        f"first token of {found['short_prompt_tokens']} tokens idle {1000 * summary['idle_seconds']:.0f} ms, "
        f"while {found['long_prompt_tokens']} tokens are taken in {1000 * summary['busy_seconds']:.0f} ms: "
        f"{_interval(summary['ratio'])} times; the long one takes {_interval(summary['long_ratio'])} times "
        f"its {1000 * summary['long_alone_seconds']:.0f} ms alone."
    ]


def _memory_lines(found: dict[str, Any]) -> list[str]:
    summary = found["summary"]
    return [
        f"the server with its base {summary['bytes_of_base_alone'] / _MIB:.0f} MiB; each LoRA model more "
        f"{summary['bytes_each'] / _MIB:.1f} MiB, {summary['times_of_file']:.2f} times its file of "
        f"{summary['bytes_of_file'] / _MIB:.1f} MiB; {found['points'][-1]['models']} models grow it by "
        f"{summary['grown_bytes'] / _MIB:.0f} MiB in all."
    ]


def _front_lines(found: dict[str, Any]) -> list[str]:
    lines = []
    for address, title in (("tcp", "over TCP, as the API is"), ("unix", "on its Unix socket")):
        if address not in found:
            # It was stopped before.
            continue
        summary = found[address]["summary"]
        speeds, firsts = summary["tokens_per_second"], summary["first_token_seconds_p50"]
        lines.append(
            f"{found['num_streams']} streams through the API {speeds['api']:.0f} tokens/s, into the engine "
            f"alone, {title}, {speeds['engine']:.0f}: {_interval(summary['ratio'], 3)} times; first token "
            f"{1000 * firsts['api']:.0f} and {1000 * firsts['engine']:.0f} ms."
        )
    return lines


def _alias_lines(found: dict[str, Any]) -> list[str]:
    summary = found["summary"]
    return [
        f"{len(found['tries'])} new versions under an alias at {found['requests_per_second']} requests/s: "
        f"{summary['failures']} of {summary['requests']} requests failed, {summary['of_neither']} were of "
        f"neither version, {summary['late_of_old']} of the old one after the switch, which took "
        f"{_ms(summary['switch_seconds'])}; first token before {_ms(summary['before_p50'])} (p99 "
        f"{_ms(summary['before_p99'])}), around and after it {_ms(summary['around_p50'])} (p99 "
        f"{_ms(summary['around_p99'])})."
    ]


_OTHERS = {
    churn.NAME: _churn_lines,
    publish.NAME: _publish_lines,
    prefill.NAME: _prefill_lines,
    memory.NAME: _memory_lines,
    front.NAME: _front_lines,
    alias.NAME: _alias_lines,
}
