"""Preparation of a checked file: tokens and masks, and the faults that only a template or tokenizer shows."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from luthier.core.errors import (
    InvalidTrainingFileError,
    InvalidValidationFileError,
    JobError,
)
from luthier.core.specs import TooLong
from luthier.data.formats.base import Fault, Row, summarize_faults
from luthier.data.prepare.minhash import SIGNATURE_PARTS, Signer, row_text
from luthier.data.prepare.objectives import Purpose, learns_from, wrong_format_message
from luthier.data.prepare.prepared_rows import PreparedRows, RowWriter
from luthier.data.readers.base import RawRow
from luthier.data.readers.file_rows import FileRows, locate
from luthier.data.rendering.chat_template import ChatTemplate
from luthier.data.rendering.loss_mask import NOTHING_SUPERVISED, MaskedText, Refusal, mask_rows
from luthier.data.rendering.tokenizer import Tokenizer

_BATCH_ROWS = 256
_MAX_FAULTS = 20
_MAX_LINES_SHOWN = 20


@dataclass(frozen=True, slots=True)
class RowLimits:
    """How many rows, and how many tokens before epochs, one file of a job may have."""

    max_rows: int = 5_000_000
    max_tokens: int = 1_000_000_000

    def check(self, num_rows: int, num_tokens: int, purpose: Purpose) -> None:
        """Refuse a file whose rows so far are more."""
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
    """The outcome of a file's rows. Lengths are in tokens, after truncation; lines are the first 20."""

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
        with_signatures: whether the rows get the signatures by which a split finds near-duplicates.
        wants_pairs: whether the job learns from preferences, each of which becomes a pair of rows
            (luthier.data.prepare.preference_pairs).
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
    preparation = _Preparation(
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
            raise _error_for(purpose, wrong_format_message(purpose, rows.format.name))
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
        rows = [item[1] for item in batch if not isinstance(item, Fault)]
        masked = iter(mask_rows(self.template, self.tokenizer, rows))
        signatures: Iterator[npt.NDArray[np.uint32] | None] = itertools.repeat(None)
        if self.with_signatures:
            signatures = iter(self.signer.sign([row_text(row) for row in rows]))
        for item in batch:
            if isinstance(item, Fault):
                self._add(item)
                continue
            place, texts, signature = item[0], next(masked), next(signatures)
            if isinstance(texts, Refusal):
                self._add_fault(place, texts.param, texts.rule, texts.message)
            elif self._is_to_be_kept(place, texts):
                self._keep(place, texts, signature)

    def _keep(
        self, place: RawRow, texts: Sequence[MaskedText], signature: npt.NDArray[np.uint32] | None
    ) -> None:
        """Add the one row of an example, or the two of a preference, cut at the longest length."""
        self.num_kept += 1
        for one in texts:
            self.rows.add(one.encoding.ids[: self.max_length], one.mask[: self.max_length], place.number)
            self.signatures += b"" if signature is None else signature.tobytes()

    def _is_to_be_kept(self, place: RawRow, texts: Sequence[MaskedText]) -> bool:
        """Judge a row of the file by its longest text; count it, or note its fault."""
        num_tokens = max(len(one.encoding.ids) for one in texts)
        if self.too_long == "truncate" and are_equal_when_cut(texts, self.max_length):
            message = (
                f"Cut to {self.max_length} tokens, both answers are equal. Shorten them, or set "
                'training.too_long to "drop".'
            )
            self._add_fault(place, "non_preferred_output", "pair.equal", message)
            return False
        if not all(one.mask.any() for one in texts):
            param = "messages" if len(texts) == 1 else "preferred_output"
            self._add_fault(place, param, "row.nothing_supervised", NOTHING_SUPERVISED)
            return False
        if num_tokens > self.max_length and self.too_long == "error":
            self._add_fault(place, None, "row.too_long", self._too_long_message(num_tokens))
            return False
        if num_tokens > self.max_length and self.too_long == "drop":
            self.num_dropped += 1
            self.dropped_lines.append(place.number)
            return False
        first_trained = max(int(one.mask.argmax()) for one in texts)
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
            truncated_lines=tuple(self.truncated_lines[:_MAX_LINES_SHOWN]),
            dropped_lines=tuple(self.dropped_lines[:_MAX_LINES_SHOWN]),
        )
        return rows, report


def are_equal_when_cut(texts: Sequence[MaskedText], limit: int) -> bool:
    """Whether the two answers of a preference differ only in what is cut off."""
    if len(texts) != 2 or not any(one.mask[:limit].any() for one in texts):
        return False
    return np.array_equal(texts[0].encoding.ids[:limit], texts[1].encoding.ids[:limit])


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
