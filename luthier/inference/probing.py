"""What models on a lane say about short texts, by the ways that requests go: a stretch, then a row.

Legend: `V` vocabulary, `B` the first tokens of a text that are looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from luthier.inference.lane import Lane, write_virtual
from luthier.modeling.packed_adapter import PackedAdapter
from luthier.modeling.packed_work import Stretch

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


@dataclass(frozen=True)
class Said:
    """Logits, float32: after a text's first tokens, as they are in a stretch, and after its last."""

    begun_BV: torch.Tensor
    last_V: torch.Tensor


@torch.inference_mode()
def probe(lane: Lane, texts: Sequence[Text]) -> list[Said]:
    """Ask for what models say about short texts, in one step: each weight is read once for all of them.

    Args:
        lane: of their base; only its thread may call this.
        texts: of at least a token each.

    Returns:
        What each is followed by.

    Raises:
        OutOfMemoryError: when the pages are too few.
    """
    firsts = [0 if text.adapter is None else text.adapter.num_virtual_tokens for text in texts]
    lengths = [first + len(text.token_ids) for first, text in zip(firsts, texts, strict=True)]
    with lane.borrowing(*lengths) as all_pages:
        parts = []
        for text, first, pages in zip(texts, firsts, all_pages, strict=True):
            if text.adapter is not None:
                write_virtual(lane.model, text.adapter, pages, 0)
            parts.append(_stretches(text, first, pages))
        # A copy: they lie where the next step writes its own.
        stretches = [one for part in parts for one in part]
        logits_RV = lane.model.step(stretches).held_RV.to(torch.float32, copy=True)
    rows = logits_RV.split([sum(one.num_logits for one in part) for part in parts])
    return [Said(_begun(own_RV, text), own_RV[-1]) for own_RV, text in zip(rows, texts, strict=True)]


def _stretches(text: Text, first: int, pages: list[int]) -> list[Stretch]:
    described = None if text.adapter is None else text.adapter.described
    ids = text.token_ids
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
