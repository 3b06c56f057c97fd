"""The pictures of the documents are valid SVG with what was printed and measured."""

import sys
from xml.etree import ElementTree

from benchmarks.pictures import Line, Ratio, draw_ratios, draw_terminal, record

_TEXT = "{http://www.w3.org/2000/svg}text"


def _texts(picture: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(picture).iter(_TEXT)]


def test_a_recording_shows_the_command_and_its_lines_without_terminal_codes():
    lines = record([sys.executable, "-c", r"print('\x1b[1ma <b>\x1b[0m'); print('10 %\r100 %')"])
    texts = _texts(draw_terminal("make demo", lines))
    assert texts[1:] == ["$ make demo", "a <b>", "100 %"]


def test_a_long_recording_leaves_out_its_middle_and_shortens_pauses():
    picture = draw_terminal("run", [Line(60.0 * number, f"{number} is a line") for number in range(100)])
    texts = _texts(picture)
    assert texts[2] == "0 is a line"
    assert "…" in texts
    assert texts[-1] == "99 is a line"
    assert "99.0 minutes" in texts[0]
    assert max(float(part.split("s")[0]) for part in picture.split("animation-delay:")[1:]) < 60


def test_lines_that_begin_alike_are_shown_at_both_ends():
    lines = [
        Line(0.0, "begin"),
        *(Line(1.0, f"Step 1 of {number}") for number in range(30)),
        Line(2.0, "end"),
    ]
    texts = _texts(draw_terminal("run", lines))
    steps = [text for text in texts if text.startswith("Step")]
    assert steps == [f"Step 1 of {number}" for number in (0, 1, 2, 3, 26, 27, 28, 29)]
    assert texts[-1] == "end"


def test_bars_are_as_long_as_the_logarithm_of_the_ratio():
    picture = draw_ratios([Ratio("two", 2.0, 1.9, 2.1), Ratio("eight", 8.0, 7.0, 9.0)])
    widths = [
        float(element.attrib["width"])
        for element in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}rect")
    ]
    # From a half: a factor of 4 and one of 16.
    assert abs(widths[1] / widths[0] - 2.0) < 0.01
    assert {"two", "eight", "2.0", "8.0"} <= set(_texts(picture))
