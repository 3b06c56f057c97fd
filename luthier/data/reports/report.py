"""The report on a file with a base: one pass over its rows, with memory that does not grow with them.

No torch: the template by jinja2, tokens by the `tokenizers` library. Never logged: a report holds texts.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from luthier.data.formats.base import Fault, Row
from luthier.data.prepare.minhash import Signer, row_key, row_text
from luthier.data.readers.base import RawRow
from luthier.data.readers.file_rows import FileRows, locate
from luthier.data.rendering.chat_template import ChatTemplate
from luthier.data.rendering.loss_mask import NOTHING_SUPERVISED, MaskedText, Refusal, mask_rows
from luthier.data.rendering.tokenizer import SPLIT, Tokenizer, without_splits
from luthier.data.reports.dedup import ExactIndex, NearIndex
from luthier.data.reports.file_report import (
    DataReport,
    FileFault,
    RepeatedRow,
    Repeats,
    Repetition,
    Shown,
    ShownRow,
)
from luthier.data.reports.token_counts import TokenCounts

MAX_FAULTS = 100
MAX_PAIRS = 20
NUM_SHOWN = 5
MAX_SHOWN_CHARS = 4000
_BATCH_ROWS = 256
_BATCH_BYTES = 1024 * 1024

# Rows with their places, or faults.
_Batch = list[tuple[RawRow, Row] | Fault]


def report_on_file(
    path: Path,
    base_folder: Path,
    *,
    context_length: int,
    validation_path: Path | None = None,
    max_seconds: float = math.inf,
) -> DataReport:
    """Report on a file that was checked at upload.

    Args:
        base_folder: a fetched base, for its template and tokenizer.
        context_length: of the base, in tokens.
        validation_path: another file; the report lists the rows that both have.
        max_seconds: time after which no more rows are read: the report is one of those before. The
            validation file has half of it.

    Raises:
        BaseUnavailableError: when the base has no template or tokenizer that can be read.
        InvalidFileFormatError: when a file holds no rows.
    """
    began = time.monotonic()
    reporter = _Reporter(ChatTemplate.load(base_folder), Tokenizer.load(base_folder), context_length)
    is_sample = False
    if validation_path is not None:
        reporter.overlap = _Repetition()
        for batch in _batches(FileRows(validation_path)):
            if time.monotonic() > began + max_seconds / 2:
                is_sample = True
                break
            reporter.add_validation(batch)
    rows = FileRows(path)
    for batch in _batches(rows):
        if reporter.num_rows and time.monotonic() > began + max_seconds:
            is_sample = True
            break
        reporter.add(batch)
    return reporter.result(None if rows.format is None else rows.format.name, is_sample=is_sample)


def _batches(rows: FileRows) -> Iterator[_Batch]:
    """Yield a file's rows in batches of bounded size."""
    batch: _Batch = []
    num_items = num_bytes = 0
    for item in rows.raw():
        if isinstance(item, Fault):
            batch.append(item)
        else:
            batch += rows.read(item)
            num_bytes += len(item.content)
        num_items += 1
        if num_items == _BATCH_ROWS or num_bytes >= _BATCH_BYTES:
            yield batch
            batch, num_items, num_bytes = [], 0, 0
    if batch:
        yield batch


@dataclass
class _Repeats:
    """A count of rows that repeat others, and the first pairs."""

    num_rows: int = 0
    pairs: list[RepeatedRow] = field(default_factory=list)

    def add(self, line: int, other: int) -> None:
        self.num_rows += 1
        if len(self.pairs) < MAX_PAIRS:
            self.pairs.append(RepeatedRow(line=line, other=other))

    def to_report(self) -> Repeats:
        return Repeats(rows=self.num_rows, pairs=self.pairs)


@dataclass
class _Repetition:
    """Indexes of rows, and the repeats that were found in them."""

    exact_index: ExactIndex = field(default_factory=ExactIndex)
    near_index: NearIndex = field(default_factory=NearIndex)
    exact: _Repeats = field(default_factory=_Repeats)
    near: _Repeats = field(default_factory=_Repeats)

    def to_report(self) -> Repetition:
        return Repetition(exact=self.exact.to_report(), near=self.near.to_report())


@dataclass
class _Reporter:
    template: ChatTemplate
    tokenizer: Tokenizer
    context_length: int
    # Of a validation file.
    overlap: _Repetition | None = None
    duplicates: _Repetition = field(default_factory=_Repetition)
    signer: Signer = field(default_factory=Signer)
    num_rows: int = 0
    num_faults: int = 0
    num_faulty_rows: int = 0
    last_faulty: tuple[int, int | None] | None = None
    faults: list[FileFault] = field(default_factory=list)
    shown: list[ShownRow] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tokens = TokenCounts(self.context_length)

    def add_validation(self, batch: _Batch) -> None:
        assert self.overlap is not None
        rows = [item for item in batch if not isinstance(item, Fault)]
        for raw, row in rows:
            self.overlap.exact_index.find_or_add(row_key(row), raw.number)
        signatures = self.signer.sign([row_text(row) for _, row in rows])
        self.overlap.near_index.find_and_add(signatures, np.array([raw.number for raw, _ in rows], np.int64))

    def add(self, batch: _Batch) -> None:
        rows = [item for item in batch if not isinstance(item, Fault)]
        self.num_rows += len(rows)
        self._look_for_repeats(rows)
        masked = iter(mask_rows(self.template, self.tokenizer, [row for _, row in rows]))
        for item in batch:
            if isinstance(item, Fault):
                self._add_fault(item)
                continue
            raw, texts = item[0], next(masked)
            if isinstance(texts, Refusal):
                self._add_row_fault(raw, *texts)
                continue
            num_supervised = [int(one.mask.sum()) for one in texts]
            if 0 in num_supervised:
                self._add_row_fault(raw, "row.nothing_supervised", "messages", NOTHING_SUPERVISED)
            self.tokens.add(raw.number, [len(one.encoding.ids) for one in texts], sum(num_supervised))
            if len(self.shown) < NUM_SHOWN:
                first, *others = [_show(one) for one in texts]
                rejected = others[0] if others else None
                self.shown.append(ShownRow(line=raw.number, rejected=rejected, **first.model_dump()))

    def _look_for_repeats(self, rows: list[tuple[RawRow, Row]]) -> None:
        if not rows:
            return
        numbers = [raw.number for raw, _ in rows]
        keys = [row_key(row) for _, row in rows]
        signatures = self.signer.sign([row_text(row) for _, row in rows])
        if self.overlap is not None:
            nearly = self.overlap.near_index.find(signatures).tolist()
            for number, key, near in zip(numbers, keys, nearly, strict=True):
                exact = self.overlap.exact_index.find(key)
                if exact is not None:
                    self.overlap.exact.add(number, exact)
                elif near >= 0:
                    self.overlap.near.add(number, near)
        is_new = np.ones(len(numbers), np.bool_)
        for index, (number, key) in enumerate(zip(numbers, keys, strict=True)):
            earlier = self.duplicates.exact_index.find_or_add(key, number)
            if earlier is not None:
                self.duplicates.exact.add(number, earlier)
                is_new[index] = False
        new_numbers = np.array(numbers, np.int64)[is_new]
        nearly = self.duplicates.near_index.find_and_add(signatures[is_new], new_numbers).tolist()
        for number, earlier in zip(new_numbers.tolist(), nearly, strict=True):
            if earlier >= 0:
                self.duplicates.near.add(number, earlier)

    def _add_row_fault(self, raw: RawRow, rule: str, param: str | None, message: str) -> None:
        self._add_fault(locate(Fault(raw.number, None, param, rule, message), raw))

    def _add_fault(self, fault: Fault) -> None:
        self.num_faults += 1
        line_and_row = (fault.line, fault.row)
        if line_and_row != self.last_faulty:
            self.num_faulty_rows += 1
            self.last_faulty = line_and_row
        if len(self.faults) < MAX_FAULTS:
            members = {name: getattr(fault, name) for name in ("line", "row", "column", "field", "rule")}
            self.faults.append(FileFault(**members, advice=fault.message))

    def result(self, format_name: str | None, *, is_sample: bool) -> DataReport:
        return DataReport(
            format=format_name,
            is_sample=is_sample,
            rows=self.num_rows,
            rows_with_faults=self.num_faulty_rows,
            num_faults=self.num_faults,
            faults=sorted(self.faults, key=lambda fault: (fault.line, fault.row or 0)),
            tokens=self.tokens.to_report(),
            duplicates=self.duplicates.to_report(),
            overlap=None if self.overlap is None else self.overlap.to_report(),
            shown=self.shown,
        )


def _show(masked: MaskedText) -> Shown:
    """Return a text and the parts of it whose tokens are supervised, cut at a bounded length."""
    text, spans = masked.text, masked.encoding.spans[masked.mask]
    if SPLIT in text:
        # Readers see a text without the splits of special tokens that a message spells.
        num_splits = np.cumsum([0] + [char == SPLIT for char in text])
        spans, text = spans - num_splits[spans], without_splits(text)
    parts: list[tuple[int, int]] = []
    for start, end in np.minimum(spans, MAX_SHOWN_CHARS).tolist():
        if start == end:
            continue
        if parts and start <= parts[-1][1]:
            parts[-1] = (parts[-1][0], max(end, parts[-1][1]))
        else:
            parts.append((start, end))
    return Shown(text=text[:MAX_SHOWN_CHARS], is_cut=len(text) > MAX_SHOWN_CHARS, supervised=parts)
