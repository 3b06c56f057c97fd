"""What a file holds, seen with a base: one pass over its rows, with memory that does not grow with them.

No torch: the template by jinja2, tokens by the `tokenizers` library. Never in a log: texts are in a report.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from luthier.data.formats.base import Fault
from luthier.data.readers.base import RawRow
from luthier.data.readers.file_rows import FileRows
from luthier.data.reports.dedup import SeenExactly, SeenNearly
from luthier.data.reports.file_report import (
    DataReport,
    FaultTold,
    PairTold,
    Repeats,
    Repetition,
    Shown,
    ShownRow,
)
from luthier.data.reports.row_analysis import Batch, Examined, Examiner
from luthier.data.reports.token_counts import TokenCounts

MAX_FAULTS = 100
MAX_PAIRS = 20
NUM_SHOWN = 5
_BATCH_ROWS = 256
_BATCH_BYTES = 1024 * 1024


def report_on_file(
    path: Path,
    base_folder: Path,
    *,
    context_length: int,
    validation_path: Path | None = None,
    max_seconds: float = math.inf,
) -> DataReport:
    """Report on a file.

    Args:
        path: the file, checked at upload.
        base_folder: a fetched base, for its template and tokenizer.
        context_length: of the base, in tokens.
        validation_path: another file, of which it is told which rows the first shares with it.
        max_seconds: after so long no more rows are read: the report is one of those before. The validation
            file has half of it.

    Raises:
        BaseUnavailableError: when the base has no template or tokenizer that can be read.
        InvalidFileFormatError: when a file is none of rows.
    """
    began = time.monotonic()
    examiner = Examiner(base_folder)
    is_sample = False
    overlap = None
    if validation_path is not None:
        overlap = _Overlap()
        for batch in _batches(FileRows(validation_path)):
            if time.monotonic() > began + max_seconds / 2:
                is_sample = True
                break
            overlap.add(examiner.examine(batch))
    reporter = _Reporter(TokenCounts(context_length), overlap)
    rows = FileRows(path)
    for batch in _batches(rows, reporter.num_to_show):
        if reporter.num_rows and time.monotonic() > began + max_seconds:
            is_sample = True
            break
        reporter.add(examiner.examine(batch))
    return reporter.result(None if rows.format is None else rows.format.name, is_sample=is_sample)


def _batches(rows: FileRows, num_to_show: Callable[[], int] | None = None) -> Iterator[Batch]:
    """Yield a file's rows in batches of bounded size, cut at the same places in any run.

    Without `num_to_show` they are only to be compared.
    """
    items: list[RawRow | Fault] = []
    num_bytes = 0

    def batch() -> Batch:
        name = "" if rows.format is None else rows.format.name
        num_shown = 0 if num_to_show is None else num_to_show()
        return Batch(name, items, num_shown, is_compared_only=num_to_show is None)

    for item in rows.raw():
        items.append(item)
        num_bytes += 0 if isinstance(item, Fault) else len(item.content)
        if len(items) == _BATCH_ROWS or num_bytes >= _BATCH_BYTES:
            yield batch()
            items, num_bytes = [], 0
    if items:
        yield batch()


@dataclass
class _Repeats:
    """A count of rows that repeat others, and the first pairs."""

    num_rows: int = 0
    pairs: list[PairTold] = field(default_factory=list)

    def add(self, line: int, other: int) -> None:
        self.num_rows += 1
        if len(self.pairs) < MAX_PAIRS:
            self.pairs.append(PairTold(line=line, other=other))

    def told(self) -> Repeats:
        return Repeats(rows=self.num_rows, pairs=self.pairs)


class _Overlap:
    """The rows of a validation file, and which rows of another one are among them."""

    def __init__(self) -> None:
        self._exactly, self._nearly = SeenExactly(), SeenNearly()
        self.exact, self.near = _Repeats(), _Repeats()

    def add(self, examined: Examined) -> None:
        """Take rows of the validation file."""
        for number, key in zip(examined.numbers, examined.keys, strict=True):
            self._exactly.find_or_add(key, number)
        self._nearly.find_and_add(examined.signatures, np.array(examined.numbers, np.int64))

    def look_up(self, numbers: list[int], keys: list[int], signatures: npt.NDArray[np.uint32]) -> None:
        nearly = self._nearly.find(signatures).tolist()
        for number, key, near in zip(numbers, keys, nearly, strict=True):
            exact = self._exactly.find(key)
            if exact is not None:
                self.exact.add(number, exact)
            elif near >= 0:
                self.near.add(number, near)

    def told(self) -> Repetition:
        return Repetition(exact=self.exact.told(), near=self.near.told())


@dataclass
class _Reporter:
    tokens: TokenCounts
    overlap: _Overlap | None
    seen_exactly: SeenExactly = field(default_factory=SeenExactly)
    seen_nearly: SeenNearly = field(default_factory=SeenNearly)
    exact: _Repeats = field(default_factory=_Repeats)
    near: _Repeats = field(default_factory=_Repeats)
    num_rows: int = 0
    num_faults: int = 0
    num_faulty_rows: int = 0
    last_faulty: tuple[int, int | None] | None = None
    faults: list[FaultTold] = field(default_factory=list)
    shown: list[ShownRow] = field(default_factory=list)

    def add(self, examined: Examined) -> None:
        self.num_rows += len(examined.numbers)
        self._look_for_repeats(examined.numbers, examined.keys, examined.signatures)
        for fault in examined.faults:
            self._add_fault(fault)
        for number, lengths, num_supervised in examined.counted:
            self.tokens.add(number, lengths, num_supervised)
        for number, texts in examined.shown[: self.num_to_show()]:
            first, *others = [
                Shown(text=text, is_cut=is_cut, supervised=supervised) for text, is_cut, supervised in texts
            ]
            rejected = others[0] if others else None
            self.shown.append(ShownRow(line=number, rejected=rejected, **first.model_dump()))

    def num_to_show(self) -> int:
        """Return how many more rows are wanted with their texts."""
        return NUM_SHOWN - len(self.shown)

    def _look_for_repeats(
        self, numbers: list[int], keys: list[int], signatures: npt.NDArray[np.uint32]
    ) -> None:
        if not numbers:
            return
        if self.overlap is not None:
            self.overlap.look_up(numbers, keys, signatures)
        is_new = np.ones(len(numbers), np.bool_)
        for index, (number, key) in enumerate(zip(numbers, keys, strict=True)):
            earlier = self.seen_exactly.find_or_add(key, number)
            if earlier is not None:
                self.exact.add(number, earlier)
                is_new[index] = False
        new_numbers = np.array(numbers, np.int64)[is_new]
        nearly = self.seen_nearly.find_and_add(signatures[is_new], new_numbers)
        for number, earlier in zip(new_numbers.tolist(), nearly.tolist(), strict=True):
            if earlier >= 0:
                self.near.add(number, earlier)

    def _add_fault(self, fault: Fault) -> None:
        self.num_faults += 1
        line_and_row = (fault.line, fault.row)
        if line_and_row != self.last_faulty:
            self.num_faulty_rows += 1
            self.last_faulty = line_and_row
        if len(self.faults) < MAX_FAULTS:
            told = FaultTold(
                line=fault.line,
                row=fault.row,
                column=fault.column,
                field=fault.field,
                rule=fault.rule,
                advice=fault.message,
            )
            self.faults.append(told)

    def result(self, format_name: str | None, *, is_sample: bool) -> DataReport:
        return DataReport(
            format=format_name,
            is_sample=is_sample,
            rows=self.num_rows,
            rows_with_faults=self.num_faulty_rows,
            num_faults=self.num_faults,
            faults=sorted(self.faults, key=lambda fault: (fault.line, fault.row or 0)),
            tokens=self.tokens.told(),
            duplicates=Repetition(exact=self.exact.told(), near=self.near.told()),
            overlap=None if self.overlap is None else self.overlap.told(),
            shown=self.shown,
        )
