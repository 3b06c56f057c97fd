"""What models on a lane say about short texts, by the ways that requests go: a stretch, then a row.

Legend: `V` vocabulary, `B` the first tokens of a text that are looked at, `R` the logits of several texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from luthier.modeling.packed_adapter import PackedAdapter
from luthier.modeling.packed_llama import PackedLlama
from luthier.modeling.packed_work import Stretch

if TYPE_CHECKING:
    from luthier.inference.lane import Lane

# After how many of a text's first tokens it is looked at.
NUM_BEGUN = 2
# Of fewer tokens none is left for a row behind a stretch: alone they would be rows of one sequence.
_LEAST_TOKENS = 3


@dataclass(frozen=True)
class Text:
    """A text, and what lies on the base, prepared.

    `ends_in_row` says whether its last token is a row by itself behind the others, where these are several;
    it is looked at after `num_begun` of its first tokens.
    """

    token_ids: list[int]
    adapter: PackedAdapter | None
    ends_in_row: bool = True
    num_begun: int = NUM_BEGUN

    @property
    def first(self) -> int:
        """The position of its first token."""
        return 0 if self.adapter is None else self.adapter.num_virtual_tokens

    @property
    def num_positions(self) -> int:
        """Positions that it takes."""
        return self.first + len(self.token_ids)


@dataclass(frozen=True)
class Said:
    """Logits, float32: after a text's first tokens, as they are in a stretch, and after its last."""

    begun_BV: torch.Tensor
    last_V: torch.Tensor


class Asked:
    """Texts that are part of a step.

    Args:
        model: what runs them; only the thread that runs its steps may ask.
        texts: of at least a token each.
        pages: of each, for all its positions; the keys and values of virtual tokens are put there.
    """

    def __init__(self, model: PackedLlama, texts: Sequence[Text], pages: Sequence[list[int]]) -> None:
        self._texts = texts
        self._parts = []
        for text, own in zip(texts, pages, strict=True):
            if text.adapter is not None:
                text.adapter.write_virtual(model.pages, own)
            self._parts.append(_stretches(text, own))

    @property
    def stretches(self) -> list[Stretch]:
        """What the step runs for them."""
        return [one for part in self._parts for one in part]

    def read(self, logits_RV: torch.Tensor) -> list[Said]:
        """Return what each text is followed by, from the step's logits of these stretches."""
        # A copy: they lie where the next step may write its own.
        copied_RV = logits_RV.to(torch.float32, copy=True)
        rows = copied_RV.split([sum(one.num_logits for one in part) for part in self._parts])
        return [
            Said(_begun(own_RV, text), own_RV[-1]) for own_RV, text in zip(rows, self._texts, strict=True)
        ]


def probe(lane: "Lane", texts: Sequence[Text]) -> list[Said]:
    """Ask for what models say about short texts, in one step: each weight is read once for all of them.

    Args:
        lane: of their base; only its thread may call this.
        texts: of at least a token each.

    Returns:
        What each is followed by.

    Raises:
        OutOfMemoryError: when the pages are too few.
    """
    with lane.borrowing(*(text.num_positions for text in texts)) as pages:
        return ask(lane.model, texts, pages)


@torch.inference_mode()
def ask(model: PackedLlama, texts: Sequence[Text], pages: Sequence[list[int]]) -> list[Said]:
    """Return what models say about texts, each in pages that are there for it."""
    asked = Asked(model, texts, pages)
    return asked.read(model.step(asked.stretches).held_RV)


def _stretches(text: Text, pages: list[int]) -> list[Stretch]:
    described = None if text.adapter is None else text.adapter.described
    ids, first = text.token_ids, text.first
    if not text.ends_in_row or len(ids) < _LEAST_TOKENS:
        return [Stretch(ids, first, pages, described, num_first_logits=min(text.num_begun, len(ids) - 1))]
    end = len(ids) - 1
    count = min(text.num_begun, end)
    begin = Stretch(ids[:end], first, pages, described, wants_logits=False, num_first_logits=count)
    return [begin, Stretch(ids[end:], first + end, pages, described)]


def _begun(own_RV: torch.Tensor, text: Text) -> torch.Tensor:
    """Return the rows of the first tokens: all but the last one's, unless this is one of them."""
    is_all = not (text.ends_in_row and len(text.token_ids) >= _LEAST_TOKENS)
    return own_RV[: text.num_begun] if is_all else own_RV[:-1]
