"""Pictures of the documents as SVG: a terminal recording of a command, and bars of a benchmark's ratios.

python -m benchmarks.pictures record docs/pictures/demo.svg -- make demo
python -m benchmarks.pictures ratios benchmarks/results/ratios.svg
"""

import argparse
import itertools
import json
import math
import re
import shlex
import subprocess
import time
from dataclasses import dataclass
from html import escape
from pathlib import Path

from benchmarks.results_file import ROOT

_FONT = "ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"
_ROW_HEIGHT, _CHARACTER_WIDTH, _MARGIN = 18, 7.85, 16
_MAX_COLUMNS, _MAX_ROWS = 104, 60
# Of lines in a row that begin with the same characters, such as steps of training, the ends are shown.
_NUM_ALIKE_CHARACTERS, _NUM_ALIKE_SHOWN = 10, 4
# A pause of the recording is shown this long at most.
_MAX_PAUSE_SECONDS = 0.7
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Line:
    """A line of output and the seconds after the start at which it came."""

    seconds: float
    text: str


def record(command: list[str]) -> list[Line]:
    """Run a command, show its output and note when each line came.

    Raises:
        subprocess.CalledProcessError: when it fails.
    """
    begin, lines = time.monotonic(), []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        for raw in process.stdout:
            # A line that was written over is shown as it was last.
            text = _ESCAPES.sub("", raw.decode(errors="replace").rstrip()).rpartition("\r")[2]
            lines.append(Line(time.monotonic() - begin, text))
            print(text, flush=True)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return lines


def draw_terminal(command: str, lines: list[Line], note: str = "pauses shortened") -> str:
    """Draw a terminal window in which the lines appear one after the other, pauses shortened.

    Where animations are off, all lines are there at once. Lines that begin alike, and the middle of a long
    output, are left out.
    """
    total = lines[-1].seconds if lines else 0.0
    lines = _without_alike(lines)
    if len(lines) > _MAX_ROWS:
        half = _MAX_ROWS // 2
        lines = [*lines[:half], Line(lines[half].seconds, "…"), *lines[len(lines) - half :]]
    rows, shown, previous = [], 0.6, 0.0
    for number, line in enumerate([Line(0.0, f"$ {command}"), *lines]):
        shown += min(line.seconds - previous, _MAX_PAUSE_SECONDS) if number else 0.0
        previous = line.seconds
        text = line.text if len(line.text) <= _MAX_COLUMNS else line.text[: _MAX_COLUMNS - 1] + "…"
        place = f'x="{_MARGIN}" y="{56 + number * _ROW_HEIGHT}"'
        kind = "line prompt" if number == 0 else "line"
        delay, content = f"animation-delay:{shown:.2f}s", escape(text, quote=False)
        rows.append(f'<text class="{kind}" style="{delay}" {place}>{content}</text>')
    width = round(2 * _MARGIN + _MAX_COLUMNS * _CHARACTER_WIDTH)
    height = 56 + len(rows) * _ROW_HEIGHT + 4
    title = f"{command} ({total / 60:.1f} minutes, {note})"
    return _svg(
        title,
        width,
        height,
        [
            "<style>",
            f"text {{ font: 13px {_FONT}; fill: #d6deeb; white-space: pre; }}",
            ".prompt { fill: #7fdbca; } .title { fill: #8a9bb0; }",
            "@media (prefers-reduced-motion: no-preference) {",
            "  .line { opacity: 0; animation: appear 0.01s forwards; }",
            "  @keyframes appear { to { opacity: 1; } }",
            "}",
            "</style>",
            f'<rect width="{width}" height="{height}" rx="8" fill="#0d1b2a"/>',
            *(
                f'<circle cx="{20 + 18 * number}" cy="18" r="5.5" fill="{colour}"/>'
                for number, colour in enumerate(("#ff5f56", "#ffbd2e", "#27c93f"))
            ),
            f'<text class="title" x="80" y="23">{escape(title)}</text>',
            *rows,
        ],
    )


def _without_alike(lines: list[Line]) -> list[Line]:
    found: list[Line] = []
    for _, group in itertools.groupby(lines, key=lambda line: line.text[:_NUM_ALIKE_CHARACTERS]):
        alike = list(group)
        if alike[0].text and len(alike) > 2 * _NUM_ALIKE_SHOWN + 1:
            first, last = alike[:_NUM_ALIKE_SHOWN], alike[-_NUM_ALIKE_SHOWN:]
            alike = [*first, Line(first[-1].seconds, "…"), *last]
        found += alike
    return found


def _svg(title: str, width: int, height: int, content: list[str]) -> str:
    size = f'viewBox="0 0 {width} {height}" width="{width}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
    return "\n".join([head, f"<title>{escape(title)}</title>", *content, "</svg>", ""])


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as a peer we are, with the 95 % interval."""

    title: str
    median: float
    low: float
    high: float


def read_ratios(folder: Path) -> list[Ratio]:
    """Return the ratios of training and serving from the results files."""
    found = []
    for name, row in json.loads((folder / "train.json").read_text())["rows"].items():
        if "ratio" in row.get("summary", {}):
            found.append(_ratio(f"train: {name}", row["summary"]["ratio"]))
    for name, row in json.loads((folder / "serve.json").read_text())["rows"].items():
        for peer, ratio in row.get("summary", {}).get("ratios", {}).items():
            if not peer.startswith("ours"):
                found.append(_ratio(f"serve: {name}, {peer}", ratio))
    return found


def _ratio(title: str, ratio: dict[str, float]) -> Ratio:
    return Ratio(title, ratio["median"], ratio["low"], ratio["high"])


def draw_ratios(ratios: list[Ratio]) -> str:
    """Draw a bar for each ratio on a logarithmic scale; a line marks a peer as fast as we are."""
    left, right, row = 300, 420, 24
    most = max(ratio.high for ratio in ratios)

    def place(value: float) -> float:
        return left + right * (math.log(max(value, 0.5)) - math.log(0.5)) / (math.log(most) - math.log(0.5))

    title = "Ours beside others on the same machine: times as fast, with the 95 % interval"
    height = 44 + len(ratios) * row + 26
    content = [
        f"<style>text {{ font: 12px {_FONT}; fill: #57606a; }} .head {{ font-weight: bold; }}</style>",
        f'<text class="head" x="12" y="22">{title}</text>',
        f'<line x1="{place(1):.1f}" x2="{place(1):.1f}" y1="34" y2="{height - 24}" stroke="#cf222e"/>',
    ]
    for number, ratio in enumerate(ratios):
        y = 40 + number * row
        middle = y + row / 2 - 3
        content += [
            f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{escape(ratio.title)}</text>',
            f'<rect x="{left}" y="{y + 1}" width="{place(ratio.median) - left:.1f}" height="16" '
            'fill="#54aeff"/>',
            f'<line x1="{place(ratio.low):.1f}" x2="{place(ratio.high):.1f}" y1="{middle}" y2="{middle}" '
            'stroke="#0a3069" stroke-width="2"/>',
            f'<text x="{place(ratio.high) + 6:.1f}" y="{y + 13}">{ratio.median:.1f}</text>',
        ]
    ticks = [value for value in (0.5, 1, 2, 5, 10, 20) if value <= most]
    content += [
        f'<text x="{place(value):.1f}" y="{height - 8}" text-anchor="middle">{value:g}</text>'
        for value in ticks
    ]
    return _svg(title, left + right + 70, height, content)


def main() -> None:
    """Draw what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pictures", description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    recording = kinds.add_parser("record", help="run a command and draw its output")
    recording.add_argument("out", type=Path)
    recording.add_argument("command", nargs="+")
    recording.add_argument("--as", dest="shown", help="the command that the picture shows in its place")
    recording.add_argument("--note", default="pauses shortened", help="what the title says beside the time")
    chart = kinds.add_parser("ratios", help="draw the ratios of benchmarks/results")
    chart.add_argument("out", type=Path)
    options = parser.parse_args()
    if options.kind == "record":
        picture = draw_terminal(
            options.shown or shlex.join(options.command), record(options.command), options.note
        )
    else:
        picture = draw_ratios(read_ratios(ROOT / "benchmarks" / "results"))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
