"""What models on a lane say about short texts, by the ways that requests go: a stretch, then a row.

Legend: `V` vocabulary, `B` the first tokens of a text that are looked at.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from luthier.inference.lane import Lane, write_virtual
from luthier.modeling.packed_adapter import PackedAdapter
from luthier.modeling.packed_llama import Stretch

# After how many of a text's first tokens it is looked at, if it has more.
NUM_BEGUN = 2


@dataclass(frozen=True)
class Text:
    """A text, and what lies on the base, prepared."""

    token_ids: list[int]
    adapter: PackedAdapter | None


@dataclass(frozen=True)
class Said:
    """Logits, float32: after a text's first tokens, of a stretch, and after its last, of a row by itself.

    `begun_BV` has fewer rows where a text has no more tokens than are looked at.
    """

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
        stretches = []
        for text, first, pages in zip(texts, firsts, all_pages, strict=True):
            adapter, end = text.adapter, len(text.token_ids) - 1
            described = None if adapter is None else adapter.described
            if adapter is not None:
                write_virtual(lane.model, adapter, pages, 0)
            if end > 0:
                begin = Stretch(
                    text.token_ids[:end],
                    first,
                    pages,
                    described,
                    wants_logits=False,
                    num_first_logits=min(NUM_BEGUN, end),
                )
                stretches.append(begin)
            stretches.append(Stretch(text.token_ids[end:], first + end, pages, described))
        # A copy: they lie where the next step writes its own.
        logits_RV = lane.model.step(stretches).held_RV.to(torch.float32, copy=True)
    counts = [min(NUM_BEGUN, len(text.token_ids) - 1) + 1 for text in texts]
    return [Said(own_RV[:-1], own_RV[-1]) for own_RV in logits_RV.split(counts)]
