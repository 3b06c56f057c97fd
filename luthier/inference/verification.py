"""Verification of models on a lane: what they say about short texts, by the ways that requests go.

Runs between two steps of the lane's engine. Never the checks themselves (proofs.py).

Legend: `V` vocabulary, `B` the first tokens of a text, `R` the logits of several texts, `N` input vectors,
`D` hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from luthier.core.canary import Canary
from luthier.inference.engine.scheduler import Lane
from luthier.inference.engine.step import MAX_PROMPT_TOKENS
from luthier.inference.proofs import (
    CANARY_TOLERANCE,
    check_canary,
    check_finite_logits,
    check_probe,
    check_row,
    gap_between,
)
from luthier.modeling.packed_adapter import PackedAdapter
from luthier.modeling.packed_work import Stretch

# Of fewer tokens none is left for a row behind a stretch: alone they would be rows of one sequence.
_LEAST_TOKENS = 3


@dataclass(frozen=True)
class Text:
    """A text and the adapter that it is run with, prepared.

    Its last token is a row by itself behind the others, where these are several.
    """

    token_ids: list[int]
    adapter: PackedAdapter | None

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
    """Logits, float32: after each token of a text that is run as a stretch, and after its last one."""

    begun_BV: torch.Tensor
    last_V: torch.Tensor


@torch.inference_mode()
def probe(lane: Lane, texts: Sequence[Text]) -> list[Said]:
    """Run short texts, in one step: each weight is read once for all of them.

    Args:
        lane: of their base; only its thread may call this.
        texts: of at least a token each.

    Returns:
        What each is followed by.

    Raises:
        OutOfMemoryError: when the pages are too few.
    """
    with lane.borrowing(*(text.num_positions for text in texts)) as pages:
        parts = []
        for text, own in zip(texts, pages, strict=True):
            if text.adapter is not None:
                text.adapter.write_virtual(lane.model.pages, own)
            parts.append(_stretches(text, own))
        logits_RV = lane.model.step([one for part in parts for one in part]).held_RV
        # A copy: the next step may write its own where they are.
        counts = [sum(one.num_logits for one in part) for part in parts]
        rows = logits_RV.to(torch.float32, copy=True).split(counts)
    return [Said(own_RV[:-1] if len(own_RV) > 1 else own_RV, own_RV[-1]) for own_RV in rows]


def verify_adapter(lane: Lane, adapter: PackedAdapter, probe_ids: list[int], canary: Canary | None) -> None:
    """Check that an adapter's logits are finite, others than the base's, and those that training recorded.

    Args:
        lane: the adapter's; only its thread may call this.
        adapter: packed on that lane's base.
        probe_ids: the text that is run where training recorded none.
        canary: what training recorded; None for artifacts that are older than that.

    Raises:
        ArtifactCorruptError: when the vocabularies differ.
        OutOfMemoryError: when the pages are too few.
        SelfCheckError: when it fails.
    """
    prepare(lane, adapter)
    ids = probe_ids if canary is None else canary.token_ids
    wholes, firsts = ([Text(own, one) for one in (adapter, None)] for own in (ids, ids[:1]))
    said, base_said, row, base_row = probe(lane, [*wholes, *firsts])
    check_finite_logits(torch.cat([said.begun_BV, said.last_V[None], row.last_V[None]]))
    check_row(said.begun_BV[0], base_said.begun_BV[0], row.last_V, base_row.last_V)
    if gap_between(said.begun_BV, base_said.begun_BV) <= CANARY_TOLERANCE:
        # Beside others rounding may make a small change where there is none: each in a step of its own.
        (found,), (expected,) = (probe(lane, [whole]) for whole in wholes)
        check_probe(found.begun_BV, expected.begun_BV)
    check_canary(canary, lane.model.dtype, lambda _token_ids: said.last_V)


@torch.inference_mode()
def prepare(lane: Lane, adapter: PackedAdapter) -> None:
    """Run an adapter's input vectors, so that it has keys and values from then on.

    Args:
        lane: of its base; only its thread may call this.
        adapter: packed on that base; one without input vectors is left as it is.

    Raises:
        OutOfMemoryError: when the pages are too few for them.
    """
    vectors_ND, model = adapter.embeddings_ND, lane.model
    if vectors_ND is None:
        return
    with lane.borrowing(len(vectors_ND)) as (pages,):
        for first in range(0, len(vectors_ND), MAX_PROMPT_TOKENS):
            part_ND = vectors_ND[first : first + MAX_PROMPT_TOKENS]
            model.step([Stretch(part_ND, first, pages, wants_logits=False)])
        adapter.take_key_values(*model.pages.read(pages, len(vectors_ND)))


def _stretches(text: Text, pages: list[int]) -> list[Stretch]:
    described = None if text.adapter is None else text.adapter.described
    ids, first, end = text.token_ids, text.first, len(text.token_ids) - 1
    if len(ids) < _LEAST_TOKENS:
        return [Stretch(ids, first, pages, described, num_first_logits=end)]
    begin = Stretch(ids[:end], first, pages, described, wants_logits=False, num_first_logits=end)
    return [begin, Stretch(ids[end:], first + end, pages, described)]
