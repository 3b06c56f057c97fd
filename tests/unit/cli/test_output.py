"""What reaches a terminal."""

from pathlib import Path

import pytest

from luthier.cli.commands.follow import duration, event_line, outcome_line
from luthier.cli.output import print_table, printable


def test_control_characters_of_users_text_do_not_reach_the_terminal():
    assert printable("a\x1b[31mb\r\nc") == "a\\x1b[31mb\\r\\nc"
    assert printable("Zoë 日本") == "Zoë 日本"


def test_a_table_never_cuts_a_cell(capsys):
    print_table(("ID", "NAME"), [("x" * 200, "y"), ("z", "\x1b[0m")], empty="none")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["x" * 200, "y"]
    assert "\x1b" not in lines[2]


def test_an_empty_table_says_so(capsys):
    print_table(("ID",), [], empty="There is nothing.")
    assert capsys.readouterr().out == "There is nothing.\n"


def test_a_metrics_event_shows_speed_and_time_left():
    data = {"step": 3, "total_steps": 9, "train_loss": 1.5, "tokens_per_second": 812.4, "seconds_left": 65.2}
    event = {"created_at": None, "type": "metrics", "message": "Step 3/9: training loss=1.50", "data": data}
    assert event_line(event) == "-  Step 3/9: training loss=1.50  812 tokens/s  1:05 left"


def test_a_warning_is_marked_and_an_event_without_data_is_no_fault():
    event = {"created_at": None, "type": "message", "level": "warn", "message": "slow", "data": None}
    assert event_line(event) == "-  WARN  slow"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0:00"), (59.6, "1:00"), (3723, "1:02:03"), (-5, "0:00")]
)
def test_a_length_of_time_is_shown_as_on_a_clock(seconds, text):
    assert duration(seconds) == text


def test_an_outcome_names_the_model_or_the_fault():
    succeeded = {"status": "succeeded", "fine_tuned_model": "ft:a"}
    assert outcome_line(succeeded) == "Succeeded: ft:a\nTalk to it: luthier chat ft:a"
    assert outcome_line(succeeded, Path("/my home")).endswith("luthier chat ft:a --home '/my home'")
    failed = {"status": "failed", "error": {"code": "out_of_memory", "message": "Too little memory."}}
    assert outcome_line(failed) == "Failed (out_of_memory): Too little memory."
    assert outcome_line({"status": "cancelled", "error": None}) == "Cancelled"
