"""The seam between bytes and rows: which files are looked into, and what becomes of the others."""

import os

import pytest

from luthier.core.errors import (
    InvalidFileFormatError,
    InvalidValueError,
    UnavailableError,
    UnsupportedValueError,
)
from luthier.data.readers.base import Limits
from luthier.data.readers.check_process import CheckProcess
from luthier.data.readers.file_checker import FileFacts
from luthier.data.readers.upload_check import (
    INPUT_PURPOSES,
    OUTPUT_PURPOSES,
    UploadCheck,
    check_input_purpose,
    check_mime_type,
)

ROW = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
LIMITS = Limits(max_row_bytes=1000, max_expanded_bytes=100_000, max_expansion_ratio=100.0)
OPAQUE = b"\x89PNG\x00 no rows at all\n"


def _facts(content: bytes, num_rows: int) -> FileFacts:
    return FileFacts(num_rows, len(content), "chat" if num_rows else None)


@pytest.mark.parametrize("purpose", [p for p in INPUT_PURPOSES if p != "fine-tune"])
def test_files_of_other_purposes_are_bytes_without_rows(purpose):
    check = UploadCheck(purpose, LIMITS)
    for place in range(0, len(OPAQUE), 5):
        check.feed(OPAQUE[place : place + 5])
    assert check.finish() == _facts(OPAQUE, 0)
    with pytest.raises(InvalidFileFormatError, match="empty"):
        UploadCheck(purpose, LIMITS).finish()


def test_a_training_files_rows_are_checked():
    check = UploadCheck("fine-tune", LIMITS)
    check.feed(ROW)
    assert check.finish() == _facts(ROW, 1)
    broken = UploadCheck("fine-tune", LIMITS)
    broken.feed(ROW + b"{}\n")
    with pytest.raises(InvalidFileFormatError, match="Line 2"):
        broken.finish()


@pytest.mark.parametrize("content", [ROW, ROW * 3])
def test_a_purpose_that_comes_late_decides_as_one_that_comes_early(content):
    late = UploadCheck(None, LIMITS)
    late.feed(content)
    late.decide("fine-tune")
    assert late.finish() == _facts(content, content.count(b"\n"))
    other = UploadCheck(None, LIMITS)
    other.feed(content)
    other.decide("user_data")
    assert other.finish() == _facts(content, 0)


def test_a_fault_before_the_purpose_counts_for_training_files_only():
    for purpose in ("fine-tune", "vision"):
        check = UploadCheck(None, LIMITS)
        # More faults than are counted, so that they are raised while bytes still come.
        for _ in range(3):
            check.feed(b"{}\n" * 20)
        check.decide(purpose)
        if purpose == "vision":
            assert check.finish().num_bytes == 180
        else:
            with pytest.raises(InvalidFileFormatError, match="Line 1"):
                check.finish()


def test_purposes_of_answers_are_refused_by_name_and_unknown_ones_too():
    for purpose in INPUT_PURPOSES:
        assert check_input_purpose(purpose) == purpose
    for purpose in OUTPUT_PURPOSES:
        with pytest.raises(UnsupportedValueError, match="made by the service"):
            check_input_purpose(purpose)
    with pytest.raises(InvalidValueError, match="is unknown"):
        check_input_purpose("finetune")


def test_only_what_can_never_be_rows_is_refused_by_its_mime_type():
    for mime_type in ("text/jsonl", "application/json", "application/x-ndjson", "text/csv", "pdf", "x"):
        check_mime_type(mime_type, "fine-tune")
    check_mime_type("image/png", "vision")
    with pytest.raises(InvalidValueError, match="image/png"):
        check_mime_type("image/png", "fine-tune")


def test_a_process_that_fails_or_ends_is_no_fault_of_the_file(tmp_path, capfd):
    failing = CheckProcess(LIMITS, tmp_path / "none")
    with pytest.raises(RuntimeError, match=r"failed with FileNotFoundError at \S+\.py:\d+ \w+\.$"):
        failing.finish()
    failing.close()
    killed = CheckProcess(LIMITS, None)
    killed.kill()
    with pytest.raises(UnavailableError, match="has ended"):
        for _ in range(99):
            killed.feed(b'{"text": "a row"}\n' * 10_000)
    killed.close()
    assert not any("Traceback" in printed for printed in capfd.readouterr())


def test_a_check_of_a_large_file_yields_its_processor_to_the_steps_of_the_inference_server():
    process = CheckProcess(Limits(), None)
    try:
        process.feed(b'{"text":"a"}\n')
        process.finish()
        # It has ended, and has not been waited for.
        assert os.getpriority(os.PRIO_PROCESS, process._process.pid) > os.getpriority(os.PRIO_PROCESS, 0)
    finally:
        process.close()
