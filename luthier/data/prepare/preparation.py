"""From a checked file to tokens and mask, with every fault that only a template or a tokenizer shows."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from luthier.core.errors import (
    InvalidTrainingFileError,
    InvalidValidationFileError,
    InvalidValueError,
    JobError,
)
from luthier.core.specs import TooLong
from luthier.data.formats.base import Fault, Row, summarize_faults
from luthier.data.prepare.minhash import SIGNATURE_PARTS, Signer, row_text
from luthier.data.prepare.objectives import Purpose, learns_from, tell_wrong_format
from luthier.data.prepare.prepared_rows import PreparedRows, RowWriter
from luthier.data.readers.base import RawRow
from luthier.data.readers.file_rows import FileRows, locate
from luthier.data.rendering.chat_template import ChatTemplate
from luthier.data.rendering.loss_mask import (
    NOTHING_SUPERVISED,
    RenderedRow,
    encode_rows,
    mask_tokens,
    render_parts,
)
from luthier.data.rendering.tokenizer import Encoding, Tokenizer

_BATCH_ROWS = 256
_MAX_FAULTS = 20
_MAX_LINES_TOLD = 20


@dataclass(frozen=True, slots=True)
class RowLimits:
    """How many rows, and how many tokens before epochs, one file of a job may have."""

    max_rows: int = 5_000_000
    max_tokens: int = 1_000_000_000

    def check(self, num_rows: int, num_tokens: int, purpose: Purpose) -> None:
        """Refuse a file that has more, as far as it is read."""
        limits = (
            ("rows", num_rows, self.max_rows, "LUTHIER_MAX_TRAINING_ROWS"),
            ("tokens", num_tokens, self.max_tokens, "LUTHIER_MAX_TRAINING_TOKENS"),
        )
        for what, num, most, setting in limits:
            if num > most:
                raise _error_for(
                    purpose,
                    f"The {purpose} file has more than {most} {what}, the limit of one file: {num} in its "
                    f"first {num_rows} rows. Split it, or ask the operator to raise {setting}.",
                )


@dataclass(frozen=True, slots=True)
class PreparedReport:
    """What became of a file's rows. Lengths are in tokens, after truncation; lines are the first 20."""

    num_rows: int
    num_tokens: int
    num_supervised_tokens: int
    num_truncated: int
    num_dropped: int
    longest_tokens: int
    truncated_lines: tuple[int, ...]
    dropped_lines: tuple[int, ...]


def prepare_rows(
    path: Path,
    base_folder: Path,
    *,
    max_length: int,
    too_long: TooLong,
    purpose: Purpose,
    with_signatures: bool = False,
    wants_pairs: bool = False,
    limits: RowLimits = RowLimits(),
    note_progress: Callable[[], None] = lambda: None,
) -> tuple[PreparedRows, PreparedReport]:
    """Render, tokenise and mask every row of a file.

    Args:
        base_folder: a fetched base, for its template and tokenizer.
        max_length: longest row in tokens.
        too_long: what to do with a longer row: fail, keep its beginning, or leave it out.
        purpose: which of a job's files it is; decides the error.
        with_signatures: whether the rows bear what near-duplicates are found by, for a split.
        wants_pairs: whether the job learns from preferences, each of which becomes a pair of rows
            (luthier.data.prepare.preference_pairs).
        limits: how many rows and tokens the file may have.
        note_progress: called every few hundred rows.

    Returns:
        The rows, in the file's order, and the report, whose rows are those of the file.

    Raises:
        InvalidTrainingFileError: for faults in a training file (param `training_file`): the first with
            their lines, and their number; for more rows or tokens than allowed; for preferences where the
            job learns from examples, and for examples where it learns from preferences.
        InvalidValidationFileError: the same for a validation file (param `validation_file`).
        BaseUnavailableError: when the base has no template or tokenizer that can be read.
    """
    preparation = (_PairPreparation if wants_pairs else _Preparation)(
        template=ChatTemplate.load(base_folder),
        tokenizer=Tokenizer.load(base_folder),
        max_length=max_length,
        too_long=too_long,
        with_signatures=with_signatures,
    )
    rows, num_rows = FileRows(path), 0
    items = iter(rows)
    while batch := list(itertools.islice(items, _BATCH_ROWS)):
        if rows.format is not None and not learns_from(rows.format.name, wants_pairs=wants_pairs):
            raise _error_for(purpose, tell_wrong_format(purpose, rows.format.name))
        preparation.add_batch(batch)
        num_rows += len(batch)
        limits.check(num_rows, preparation.rows.num_tokens, purpose)
        note_progress()
    if preparation.num_faults:
        raise _file_error(purpose, preparation.num_faults, preparation.faults)
    if not preparation.rows.num_rows:
        raise _empty_error(purpose, preparation.num_dropped, max_length)
    return preparation.result()


@dataclass
class _Preparation:
    template: ChatTemplate
    tokenizer: Tokenizer
    max_length: int
    too_long: TooLong
    with_signatures: bool
    signer: Signer = field(default_factory=Signer)
    rows: RowWriter = field(default_factory=RowWriter)
    # The bytes of uint32 [N, K].
    signatures: bytearray = field(default_factory=bytearray)
    # Rows of the file that were kept; of preferences each is two of `rows`.
    num_kept: int = 0
    faults: list[Fault] = field(default_factory=list)
    num_faults: int = 0
    num_truncated: int = 0
    num_dropped: int = 0
    truncated_lines: list[int] = field(default_factory=list)
    dropped_lines: list[int] = field(default_factory=list)

    def add_batch(self, batch: list[tuple[RawRow, Row] | Fault]) -> None:
        rendered = list(self._render(batch))
        encodings = encode_rows(self.tokenizer, [row for _, _, (row,) in rendered])
        signatures: Sequence[npt.NDArray[np.uint32] | None] = [None] * len(rendered)
        if self.with_signatures:
            signatures = list(self.signer.sign([text for _, text, _ in rendered]))
        for (place, _, (row,)), encoding, signature in zip(rendered, encodings, signatures, strict=True):
            try:
                mask = mask_tokens(encoding, row.spans, self.tokenizer.stop_token_ids)
            except InvalidValueError as error:
                self._add_fault(place, error.param, "row.mask", error.message)
                continue
            if self._add_row(place, encoding, mask) and signature is not None:
                self.signatures += signature.tobytes()

    def _render(
        self, batch: list[tuple[RawRow, Row] | Fault]
    ) -> Iterator[tuple[RawRow, str, tuple[RenderedRow, ...]]]:
        for item in batch:
            if isinstance(item, Fault):
                self._add(item)
                continue
            place, row = item
            try:
                parts = render_parts(self.template, row)
            except InvalidValueError as error:
                self._add_fault(place, error.param, "row.template", error.message)
                continue
            yield place, row_text(row) if self.with_signatures else "", parts

    def _add_row(self, place: RawRow, encoding: Encoding, mask: npt.NDArray[np.bool_]) -> bool:
        """Keep a row, cut where that was asked for, and return whether it was kept."""
        if not self._is_to_be_kept(place, len(encoding.ids), [mask], "messages"):
            return False
        self.num_kept += 1
        self._keep(place.number, encoding, mask)
        return True

    def _is_to_be_kept(
        self, place: RawRow, num_tokens: int, masks: Sequence[npt.NDArray[np.bool_]], param: str
    ) -> bool:
        """Judge what is on one line of the file by its longest row; count it, or note its fault."""
        if not all(mask.any() for mask in masks):
            self._add_fault(place, param, "row.nothing_supervised", NOTHING_SUPERVISED)
            return False
        if num_tokens > self.max_length and self.too_long == "error":
            self._add_fault(place, None, "row.too_long", self._too_long_message(num_tokens))
            return False
        if num_tokens > self.max_length and self.too_long == "drop":
            self.num_dropped += 1
            self.dropped_lines.append(place.number)
            return False
        first_trained = max(int(mask.argmax()) for mask in masks)
        if first_trained >= self.max_length:
            message = (
                f"Cut to {self.max_length} tokens, nothing of the row is trained: its first trained token "
                f'is number {first_trained + 1}. Shorten it, or set training.too_long to "drop".'
            )
            self._add_fault(place, None, "row.nothing_supervised", message)
            return False
        if num_tokens > self.max_length:
            self.num_truncated += 1
            self.truncated_lines.append(place.number)
        return True

    def _keep(self, number: int, encoding: Encoding, mask: npt.NDArray[np.bool_]) -> None:
        self.rows.add(encoding.ids[: self.max_length], mask[: self.max_length], number)

    def _too_long_message(self, num_tokens: int) -> str:
        return (
            f"The row has {num_tokens} tokens, more than the {self.max_length} allowed. Shorten it, raise "
            'training.max_length if the base allows more, or set training.too_long to "truncate" or "drop".'
        )

    def _add_fault(self, place: RawRow, param: str | None, rule: str, message: str) -> None:
        self._add(locate(Fault(place.number, None, param, rule, message), place))

    def _add(self, fault: Fault) -> None:
        self.num_faults += 1
        if len(self.faults) < _MAX_FAULTS:
            self.faults.append(fault)

    def result(self) -> tuple[PreparedRows, PreparedReport]:
        signatures = np.frombuffer(self.signatures, np.uint32).reshape(-1, SIGNATURE_PARTS)
        rows = self.rows.finish(signatures if self.with_signatures else None)
        report = PreparedReport(
            num_rows=self.num_kept,
            num_tokens=rows.num_tokens,
            num_supervised_tokens=rows.num_supervised_tokens,
            num_truncated=self.num_truncated,
            num_dropped=self.num_dropped,
            longest_tokens=int(rows.lengths.max()),
            truncated_lines=tuple(self.truncated_lines[:_MAX_LINES_TOLD]),
            dropped_lines=tuple(self.dropped_lines[:_MAX_LINES_TOLD]),
        )
        return rows, report


class _PairPreparation(_Preparation):
    """Makes two rows of each preference, the preferred answer's first; both are kept, or neither."""

    def add_batch(self, batch: list[tuple[RawRow, Row] | Fault]) -> None:
        rendered = list(self._render(batch))
        encodings = encode_rows(self.tokenizer, [row for _, _, pair in rendered for row in pair])
        signatures: Sequence[npt.NDArray[np.uint32] | None] = [None] * len(rendered)
        if self.with_signatures:
            signatures = list(self.signer.sign([text for _, text, _ in rendered]))
        for index, ((place, _, pair), signature) in enumerate(zip(rendered, signatures, strict=True)):
            both = encodings[2 * index : 2 * index + 2]
            try:
                masks = [
                    mask_tokens(encoding, row.spans, self.tokenizer.stop_token_ids)
                    for encoding, row in zip(both, pair, strict=True)
                ]
            except InvalidValueError as error:
                self._add_fault(place, error.param, "row.mask", error.message)
                continue
            longest = max(len(encoding.ids) for encoding in both)
            if self._are_equal_when_cut(place, both, masks):
                continue
            if not self._is_to_be_kept(place, longest, masks, "preferred_output"):
                continue
            self.num_kept += 1
            for encoding, mask in zip(both, masks, strict=True):
                self._keep(place.number, encoding, mask)
                self.signatures += b"" if signature is None else signature.tobytes()

    def _are_equal_when_cut(
        self, place: RawRow, both: Sequence[Encoding], masks: Sequence[npt.NDArray[np.bool_]]
    ) -> bool:
        """Note the fault of a pair of which only what is cut off tells the answers apart."""
        if self.too_long != "truncate":
            return False
        one, other = (encoding.ids[: self.max_length] for encoding in both)
        is_equal = np.array_equal(one, other) and any(mask[: self.max_length].any() for mask in masks)
        if is_equal:
            message = (
                f"Cut to {self.max_length} tokens, both answers are equal. Shorten them, or set "
                'training.too_long to "drop".'
            )
            self._add_fault(place, "non_preferred_output", "pair.equal", message)
        return is_equal


def _error_for(purpose: Purpose, message: str) -> JobError:
    if purpose == "training":
        return InvalidTrainingFileError(message, param="training_file")
    return InvalidValidationFileError(message, param="validation_file")


def _file_error(purpose: Purpose, num_faults: int, faults: list[Fault]) -> JobError:
    count = "1 fault" if num_faults == 1 else f"{num_faults} faults"
    return _error_for(purpose, f"The {purpose} file has {count}. {summarize_faults(faults)}")


def _empty_error(purpose: Purpose, num_dropped: int, max_length: int) -> JobError:
    if num_dropped == 0:
        return _error_for(purpose, f"The {purpose} file is empty.")
    return _error_for(
        purpose,
        f"The {purpose} file has no row left: all {num_dropped} are longer than training.max_length "
        f"({max_length} tokens) and were dropped.",
    )
