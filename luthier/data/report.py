"""What a file holds, seen with a base: one pass over its rows, with memory that does not grow with them.

No torch: the template by jinja2, tokens by the `tokenizers` library. Never in a log: texts are in a report.
"""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from luthier.core.data_reports import DataReport, FaultTold, PairTold, Repeats, Repetition, Shown, ShownRow
from luthier.core.errors import InvalidValueError, UnavailableError
from luthier.data.containers.base import RawRow
from luthier.data.formats.base import Fault, Row
from luthier.data.mask import RenderedRow, encode_rows, mask_tokens, render_row, render_turns
from luthier.data.near import Signer, row_key, row_text
from luthier.data.render import ChatTemplate
from luthier.data.rows import FileRows, locate
from luthier.data.seen import SeenExactly, SeenNearly
from luthier.data.token_counts import TokenCounts
from luthier.data.tokens import Encoding, Tokenizer

MAX_FAULTS = 100
MAX_PAIRS = 20
NUM_SHOWN = 5
MAX_SHOWN_CHARS = 4000
_BATCH_ROWS = 256
# Rows with their texts: one each, of a preference two.
_Rendered = list[tuple[RawRow, list[RenderedRow]]]


def report_on_file(
    path: Path,
    base_folder: Path,
    *,
    context_length: int,
    validation_path: Path | None = None,
    is_given_up: Callable[[], bool] = lambda: False,
) -> DataReport:
    """Report on a file.

    Args:
        path: the file, checked at upload.
        base_folder: a fetched base, for its template and tokenizer.
        context_length: of the base, in tokens.
        validation_path: another file, of which it is told which rows the first shares with it.
        is_given_up: asked now and then whether anybody still waits.

    Returns:
        The report.

    Raises:
        BaseUnavailableError: when the base has no template or tokenizer that can be read.
        InvalidFileFormatError: when a file is none of rows.
        UnavailableError: when nobody waits any more.
    """
    signer = Signer()
    overlap = None if validation_path is None else _Overlap(validation_path, signer, is_given_up)
    reporter = _Reporter(
        ChatTemplate.load(base_folder),
        Tokenizer.load(base_folder),
        TokenCounts(context_length),
        signer,
        overlap,
    )
    rows = FileRows(path)
    items = iter(rows)
    rendered: _Rendered = []
    # The library's own threads make tokens of one batch while the next one is rendered.
    with ThreadPoolExecutor(1) as pool:
        encodings = pool.submit(encode_rows, reporter.tokenizer, [])
        while batch := list(itertools.islice(items, _BATCH_ROWS)):
            _check_wanted(is_given_up)
            following = reporter.render_batch(batch)
            flat = [one for _, parts in following for one in parts]
            reporter.add_batch(rendered, encodings.result())
            rendered, encodings = following, pool.submit(encode_rows, reporter.tokenizer, flat)
        reporter.add_batch(rendered, encodings.result())
    return reporter.result(None if rows.format is None else rows.format.name)


def _check_wanted(is_given_up: Callable[[], bool]) -> None:
    if is_given_up():
        raise UnavailableError("The report was given up, since nobody waits for it.")


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

    def __init__(self, path: Path, signer: Signer, is_given_up: Callable[[], bool]) -> None:
        self._signer = signer
        self._exactly, self._nearly = SeenExactly(), SeenNearly()
        self.exact, self.near = _Repeats(), _Repeats()
        items = (item for item in FileRows(path) if not isinstance(item, Fault))
        while batch := list(itertools.islice(items, _BATCH_ROWS)):
            _check_wanted(is_given_up)
            for place, row in batch:
                self._exactly.find_or_add(row_key(row), place.number)
            numbers = np.array([place.number for place, _ in batch], np.int64)
            self._nearly.find_and_add(signer.sign([row_text(row) for _, row in batch]), numbers)

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
    template: ChatTemplate
    tokenizer: Tokenizer
    tokens: TokenCounts
    signer: Signer
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

    def render_batch(self, batch: list[tuple[RawRow, Row] | Fault]) -> _Rendered:
        rows: list[tuple[RawRow, Row]] = []
        for item in batch:
            if isinstance(item, Fault):
                self._add_fault(item)
            else:
                rows.append(item)
        self.num_rows += len(rows)
        self._look_for_repeats(rows)
        return list(self._render(rows))

    def add_batch(self, rendered: _Rendered, encodings: list[Encoding]) -> None:
        following = iter(encodings)
        for place, parts in rendered:
            self._add_row(place, [(one, next(following)) for one in parts])

    def _look_for_repeats(self, rows: list[tuple[RawRow, Row]]) -> None:
        if not rows:
            return
        numbers = [place.number for place, _ in rows]
        keys = [row_key(row) for _, row in rows]
        signatures = self.signer.sign([row_text(row) for _, row in rows])
        if self.overlap is not None:
            self.overlap.look_up(numbers, keys, signatures)
        is_new = np.ones(len(rows), np.bool_)
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

    def _render(self, rows: list[tuple[RawRow, Row]]) -> Iterator[tuple[RawRow, list[RenderedRow]]]:
        """Yield each row that the template renders: one text, of a preference two."""
        for place, row in rows:
            try:
                parts = [render_row(self.template, row)]
                if row.rejected is not None:
                    parts.append(render_turns(self.template, row.rejected, row.tools))
            except InvalidValueError as error:
                self._add_fault(
                    locate(Fault(place.number, None, error.param, "row.template", error.message), place)
                )
                continue
            yield place, parts

    def _add_row(self, place: RawRow, parts: list[tuple[RenderedRow, Encoding]]) -> None:
        try:
            masks = [
                mask_tokens(encoding, one.spans, self.tokenizer.stop_token_ids) for one, encoding in parts
            ]
        except InvalidValueError as error:
            self._add_fault(locate(Fault(place.number, None, error.param, "row.mask", error.message), place))
            return
        if not all(mask.any() for mask in masks):
            told = "No token of the row is trained: leave out weight 0 on at least one assistant message."
            self._add_fault(
                locate(Fault(place.number, None, "messages", "row.nothing_supervised", told), place)
            )
        lengths = [len(encoding.ids) for _, encoding in parts]
        self.tokens.add(place.number, lengths, sum(int(mask.sum()) for mask in masks))
        if len(self.shown) < NUM_SHOWN:
            texts = [
                _show(one.text, encoding, mask) for (one, encoding), mask in zip(parts, masks, strict=True)
            ]
            rejected = texts[1] if len(texts) > 1 else None
            self.shown.append(ShownRow(line=place.number, rejected=rejected, **texts[0].model_dump()))

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

    def result(self, format_name: str | None) -> DataReport:
        return DataReport(
            format=format_name,
            rows=self.num_rows,
            rows_with_faults=self.num_faulty_rows,
            num_faults=self.num_faults,
            faults=sorted(self.faults, key=lambda fault: (fault.line, fault.row or 0)),
            tokens=self.tokens.told(),
            duplicates=Repetition(exact=self.exact.told(), near=self.near.told()),
            overlap=None if self.overlap is None else self.overlap.told(),
            shown=self.shown,
        )


def _show(text: str, encoding: Encoding, mask: npt.NDArray[np.bool_]) -> Shown:
    """Return a text with the parts of it whose tokens are learnt, cut at a bounded length."""
    parts: list[tuple[int, int]] = []
    for start, end in np.minimum(encoding.spans[mask], MAX_SHOWN_CHARS).tolist():
        if start == end:
            continue
        if parts and start <= parts[-1][1]:
            parts[-1] = (parts[-1][0], max(end, parts[-1][1]))
        else:
            parts.append((start, end))
    return Shown(text=text[:MAX_SHOWN_CHARS], is_cut=len(text) > MAX_SHOWN_CHARS, supervised=parts)
