"""Logs of the stack's processes."""

from luthier.cli.stack import processes
from luthier.cli.stack.processes import log_tail, rotate_log
from luthier.cli.stack.supervisor import describe_exit


def test_a_small_log_is_kept_and_an_absent_one_is_no_fault(tmp_path):
    log = tmp_path / "api.log"
    rotate_log(log)
    log.write_text("line\n")
    rotate_log(log)
    assert log.read_text() == "line\n"


def test_a_large_log_is_moved_aside_and_three_old_ones_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "_MAX_LOG_BYTES", 4)
    log = tmp_path / "api.log"
    for number in range(1, 6):
        log.write_text(f"log {number}")
        rotate_log(log)
    names = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert names == {"api.log.1": "log 5", "api.log.2": "log 4", "api.log.3": "log 3"}


def test_the_tail_holds_the_last_lines_only(tmp_path):
    log = tmp_path / "api.log"
    log.write_text("".join(f"line {number}\n" for number in range(5000)))
    assert log_tail(log, num_lines=2) == "  line 4998\n  line 4999"
    assert log_tail(tmp_path / "absent.log") == ""


def test_an_exit_is_described_in_words():
    assert describe_exit(3) == "exit code 3"
    assert describe_exit(-9) == "killed by SIGKILL"
