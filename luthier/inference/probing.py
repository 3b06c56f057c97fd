"""What models on a lane say about short texts, by both ways that requests go: as a stretch, and row by row.

Legend: `V` vocabulary, `B` the first two tokens of a text, or its only one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from luthier.inference.lane import Lane, write_virtual
from luthier.modeling.packed_adapter import PackedAdapter
from luthier.modeling.packed_llama import Stretch

NUM_BEGUN = 2


@dataclass(frozen=True)
class Text:
    """A text, and what lies on the base, prepared."""

    token_ids: list[int]
    adapter: PackedAdapter | None


@dataclass(frozen=True)
class Said:
    """Logits, float32: after a text's first tokens and after its last, as they are in the text, and after its
    first as a row by itself."""

    begun_BV: torch.Tensor
    last_V: torch.Tensor
    alone_V: torch.Tensor


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
    # Each as a whole, and its first token by itself.
    parts = [(ids, text.adapter) for text in texts for ids in (text.token_ids, text.token_ids[:1])]
    firsts = [0 if adapter is None else adapter.num_virtual_tokens for _, adapter in parts]
    lengths = [first + len(ids) for first, (ids, _) in zip(firsts, parts, strict=True)]
    with lane.borrowing(*lengths) as all_pages:
        stretches = []
        for (ids, adapter), first, pages in zip(parts, firsts, all_pages, strict=True):
            if adapter is not None:
                write_virtual(lane.model, adapter, pages, 0)
            described, num_begun = (
                None if adapter is None else adapter.described,
                min(NUM_BEGUN, len(ids) - 1),
            )
            stretches.append(Stretch(ids, first, pages, described, num_first_logits=num_begun))
        # A copy: they lie where the next step writes its own.
        logits_RV = lane.model.step(stretches).held_RV.to(torch.float32, copy=True)
    rows = logits_RV.split([one.num_logits for one in stretches])
    return [
        Said(whole_RV[:NUM_BEGUN], whole_RV[-1], alone_1V[0])
        for whole_RV, alone_1V in zip(rows[::2], rows[1::2], strict=True)
    ]
