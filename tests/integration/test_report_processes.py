"""Processes that share a report's work: the same report, and no silence where one ends."""

import pytest

from luthier.core.errors import BaseUnavailableError, UnavailableError
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
