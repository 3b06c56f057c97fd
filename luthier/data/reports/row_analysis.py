"""What a report takes of each row, a batch at a time: its faults, by what it is compared, its tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from luthier.core.errors import InvalidValueError
from luthier.data.formats import discover
from luthier.data.formats.base import Fault, Row
from luthier.data.prepare.minhash import Signatures, Signer, row_key, row_text
from luthier.data.readers.base import RawRow
from luthier.data.readers.file_rows import locate, read_row
from luthier.data.rendering.chat_template import ChatTemplate
from luthier.data.rendering.loss_mask import (
    NOTHING_SUPERVISED,
    RenderedRow,
    encode_rows,
    mask_tokens,
    render_parts,
)
from luthier.data.rendering.special_tokens import SPLIT, without_splits
from luthier.data.rendering.tokenizer import Encoding, Tokenizer

MAX_SHOWN_CHARS = 4000


@dataclass
class Batch:
    """Rows that follow each other in a file, or faults in their place.

    `format_name` is that of the file. `num_shown` is how many rows at most are wanted with their texts.
    `is_compared_only` says that neither faults nor tokens are wanted.
    """

    format_name: str
    items: list[RawRow | Fault]
    num_shown: int = 0
    is_compared_only: bool = False


class Counted(NamedTuple):
    """Tokens of one row, of a preference in two conversations; `num_supervised` are of both together."""

    number: int
    lengths: list[int]
    num_supervised: int


class _RowTokens(NamedTuple):
    length: int
    num_supervised: int


class ShownText(NamedTuple):
    """A row's text, cut at a bounded length, and which characters of it are learnt."""

    text: str
    is_cut: bool
    supervised: list[tuple[int, int]]


@dataclass
class Examined:
    """What was taken of a batch.

    `numbers` are the rows' that could be read, `keys` and `signatures` (uint32 [N, parts]) say
    what is in them. `counted` are those of them that the template renders. `faults` are in the order of the
    rows, `shown` the first rows by their numbers.
    """

    numbers: list[int]
    keys: list[int]
    signatures: Signatures
    counted: list[Counted]
    faults: list[Fault]
    shown: list[tuple[int, list[ShownText]]]


# A fault and the place of its row in the batch.
_PlacedFault: TypeAlias = tuple[int, Fault]


class _Rendered(NamedTuple):
    """A row's place in the batch, its place in the file, and the texts that it becomes."""

    place: int
    raw: RawRow
    parts: tuple[RenderedRow, ...]


class Examiner:
    """Examine rows with a base's template and tokenizer.

    Raises:
        BaseUnavailableError: when the base has no template or tokenizer that can be read.
    """

    def __init__(self, base_folder: Path) -> None:
        self._template = ChatTemplate.load(base_folder)
        self._tokenizer = Tokenizer.load(base_folder)
        self._signer = Signer()

    def examine(self, batch: Batch) -> Examined:
        """Examine rows.

        Returns:
            What was found; nothing of it depends on other batches.
        """
        row_format = discover()[batch.format_name] if batch.format_name else None
        faults: list[_PlacedFault] = []
        rows: list[tuple[int, RawRow, Row]] = []
        for place, item in enumerate(batch.items):
            if isinstance(item, Fault):
                faults.append((place, item))
                continue
            if row_format is None:
                raise ValueError("A batch that holds rows names no format.")
            found = read_row(row_format, item)
            if isinstance(found, list):
                faults += [(place, fault) for fault in found]
            else:
                rows.append((place, *found))
        signatures = self._signer.sign([row_text(row) for _, _, row in rows])
        examined = Examined(
            numbers=[raw.number for _, raw, _ in rows],
            keys=[row_key(row) for _, _, row in rows],
            signatures=signatures,
            counted=[],
            faults=[],
            shown=[],
        )
        if not batch.is_compared_only:
            rendered = self._render_rows(rows, faults)
            examined.counted = self._count_rows(rendered, faults)
            counted = {one.number for one in examined.counted}
            to_show = [one for one in rendered if one.raw.number in counted][: batch.num_shown]
            examined.shown = [(raw.number, self._show(parts)) for _, raw, parts in to_show]
            examined.faults = [fault for _, fault in sorted(faults, key=lambda one: one[0])]
        return examined

    def _render_rows(
        self, rows: Sequence[tuple[int, RawRow, Row]], faults: list[_PlacedFault]
    ) -> list[_Rendered]:
        """Render rows; where the template refuses one, add its fault instead."""
        rendered: list[_Rendered] = []
        for place, raw, row in rows:
            try:
                rendered.append(_Rendered(place, raw, render_parts(self._template, row)))
            except InvalidValueError as error:
                faults.append((place, _fault(raw, error.param, "row.template", error.message)))
        return rendered

    def _count_rows(self, rendered: Sequence[_Rendered], faults: list[_PlacedFault]) -> list[Counted]:
        """Count the tokens of rows; where it can't be told which are learnt, or none is, add the fault."""
        counted: list[Counted] = []
        tokens = iter(self._count_tokens([one for _, _, parts in rendered for one in parts]))
        for place, raw, parts in rendered:
            found = [next(tokens) for _ in parts]
            refusal = next((one for one in found if isinstance(one, InvalidValueError)), None)
            if refusal is not None:
                faults.append((place, _fault(raw, refusal.param, "row.mask", refusal.message)))
                continue
            counts = [one for one in found if isinstance(one, _RowTokens)]
            if not all(one.num_supervised for one in counts):
                faults.append((place, _fault(raw, "messages", "row.nothing_supervised", NOTHING_SUPERVISED)))
            counted.append(
                Counted(raw.number, [one.length for one in counts], sum(one.num_supervised for one in counts))
            )
        return counted

    def _count_tokens(self, rendered: Sequence[RenderedRow]) -> list[_RowTokens | InvalidValueError]:
        """Count the tokens of each text, or say why it can't be told which of them are learnt."""
        encodings = encode_rows(self._tokenizer, rendered)
        return [self._mask(one, encoding) for one, encoding in zip(rendered, encodings, strict=True)]

    def _mask(self, one: RenderedRow, encoding: Encoding) -> _RowTokens | InvalidValueError:
        try:
            mask = mask_tokens(encoding, one.spans, self._tokenizer.stop_token_ids)
        except InvalidValueError as error:
            return error
        return _RowTokens(len(encoding.ids), int(mask.sum()))

    def _show(self, parts: Sequence[RenderedRow]) -> list[ShownText]:
        encodings = encode_rows(self._tokenizer, parts)
        return [
            _show(one.text, encoding, mask_tokens(encoding, one.spans, self._tokenizer.stop_token_ids))
            for one, encoding in zip(parts, encodings, strict=True)
        ]


def _fault(raw: RawRow, field: str | None, rule: str, message: str) -> Fault:
    return locate(Fault(raw.number, None, field, rule, message), raw)


def _show(text: str, encoding: Encoding, mask: npt.NDArray[np.bool_]) -> ShownText:
    """Return a text with the parts of it whose tokens are learnt, cut at a bounded length."""
    parts: list[tuple[int, int]] = []
    spans = encoding.spans[mask]
    if SPLIT in text:
        # Readers see a text without the splits of marks that a message spells.
        num_splits = np.cumsum([0] + [char == SPLIT for char in text])
        spans, text = spans - num_splits[spans], without_splits(text)
    for start, end in np.minimum(spans, MAX_SHOWN_CHARS).tolist():
        if start == end:
            continue
        if parts and start <= parts[-1][1]:
            parts[-1] = (parts[-1][0], max(end, parts[-1][1]))
        else:
            parts.append((start, end))
    return ShownText(text[:MAX_SHOWN_CHARS], len(text) > MAX_SHOWN_CHARS, parts)
