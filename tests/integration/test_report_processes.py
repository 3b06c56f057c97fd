"""Processes that share a report's work: the same report, and no silence where one ends."""

import pytest

from luthier.core.errors import BaseUnavailableError, UnavailableError
from luthier.data import examiners as examiners_module
from luthier.data import report as report_module
from luthier.data.containers.base import RawRow
from luthier.data.examine import Batch
from luthier.data.examiners import Examiners
from luthier.data.report import report_on_file
from tests.rows import chat_row, colour_rows, jsonl
from tests.tiny import build_tiny_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return build_tiny_base(tmp_path_factory.mktemp("bases") / "base")


def test_the_report_is_the_same_however_many_processes_share_it(base, tmp_path):
    path, validation = tmp_path / "rows", tmp_path / "validation"
    rows = [*colour_rows(700), {"messages": []}, chat_row("q", "a", weight=0), *colour_rows(900)[600:]]
    path.write_bytes(jsonl(rows))
    validation.write_bytes(jsonl(colour_rows(300)))
    alone, shared = (
        report_on_file(
            path, base, context_length=256, validation_path=validation, num_processes=num_processes
        )
        for num_processes in (0, 2)
    )
    assert shared == alone
    assert (alone.rows, alone.num_faults, len(alone.shown), alone.overlap.exact.rows > 0) == (
        1001,
        2,
        5,
        True,
    )


def test_a_process_that_ends_is_told_and_so_is_a_base_that_can_not_be_read(base, tmp_path):
    with Examiners(base, 1) as examiners:
        assert [len(found.numbers) for found in examiners.examine(iter([Batch("", [])]))] == [0]
        [process] = examiners._processes
        process.kill()
        with pytest.raises(UnavailableError, match="has ended"):
            list(examiners.examine(iter([Batch("", [])])))
    with Examiners(tmp_path, 1) as examiners, pytest.raises(BaseUnavailableError, match="no chat template"):
        list(examiners.examine(iter([Batch("", [])])))


def test_a_fault_of_our_own_in_a_process_is_told_by_kind_and_place_without_its_text(base, capfd):
    # Looking up the format fails, with its name as the error's text.
    batch = Batch("a user's words", [RawRow(1, b"{}", 1)])
    with Examiners(base, 1) as examiners:
        with pytest.raises(RuntimeError, match=r"failed with KeyError at examine\.py:\d+ examine\.$"):
            list(examiners.examine(iter([batch])))
        assert [len(found.numbers) for found in examiners.examine(iter([Batch("", [])]))] == [0]
    assert not any("words" in printed or "Traceback" in printed for printed in capfd.readouterr())
    with Examiners(base, 0) as examiners, pytest.raises(KeyError):
        list(examiners.examine(iter([batch])))


def test_the_larger_file_decides_how_many_processes_share_a_report(base, tmp_path, monkeypatch):
    path, validation = tmp_path / "rows", tmp_path / "validation"
    path.write_bytes(jsonl(colour_rows(1)))
    validation.write_bytes(jsonl(colour_rows(9)))
    asked = []

    def start(base_folder, num_processes):
        asked.append(num_processes)
        return Examiners(base_folder, 0)

    monkeypatch.setattr(report_module, "Examiners", start)
    monkeypatch.setattr(examiners_module, "_MIN_BYTES", validation.stat().st_size)
    monkeypatch.setattr(examiners_module.os, "sched_getaffinity", lambda _: {0, 1})
    report_on_file(path, base, context_length=256)
    report_on_file(path, base, context_length=256, validation_path=validation)
    assert asked == [0, 2]
