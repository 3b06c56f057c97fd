"""The proof that an adapter gives on its lane: in the first step that it is asked in, or in one of its own.

A proof alone takes nearly as long as a step of many rows, for both read all weights. So it is part of the
step of the request that the adapter was loaded for, of which no token is taken before the proof is right.

Legend: `R` rows of logits, `B` the first tokens of a text that are looked at, `V` vocabulary, `N` input
vectors, `D` hidden size.
"""

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

import torch

from luthier.core.canary import Canary
from luthier.core.errors import LuthierError, UnavailableError
from luthier.inference.faults import to_told
from luthier.inference.probing import NUM_BEGUN, Asked, Text, ask
from luthier.inference.proofs import (
    CANARY_TOLERANCE,
    check_canary,
    check_finite_logits,
    check_probe,
    check_row,
    gap_between,
)
from luthier.inference.rows import MAX_PROMPT_TOKENS
from luthier.modeling.packed_adapter import PackedAdapter
from luthier.modeling.packed_work import Stretch

if TYPE_CHECKING:
    from luthier.inference.lane import Lane

_LOG = logging.getLogger(__name__)


class Trial:
    """A proof: logits are finite, others than the base's, and those that training recorded.

    Only the engine's thread may call its methods, but `end` where no lane has taken it.

    Args:
        probe_ids: the text that it is asked about where training recorded none.
        canary: what training recorded; None for artifacts that are older than that.
    """

    def __init__(self, adapter: PackedAdapter, probe_ids: list[int], canary: Canary | None) -> None:
        self.adapter = adapter
        # What came of it, for whoever waits on another thread.
        self.told: Future[None] = Future()
        # Whoever waits for it may leave without ending it for others.
        self.told.set_running_or_notify_cancel()
        # Whether a lane has taken it.
        self.is_begun = False
        # What it failed with, once it has.
        self.error: LuthierError | None = None
        self._canary = canary
        self._is_right = False
        self._pages: list[list[int]] = []
        self._asked: Asked | None = None
        # Training's text is as good as any.
        ids = probe_ids if canary is None else canary.token_ids
        both = (adapter, None)
        begins = Text(ids, adapter), Text(ids[:NUM_BEGUN], None, ends_in_row=False)
        self._texts = [*begins, *(Text(ids[:1], one) for one in both)]
        self._wholes = [Text(ids, one, ends_in_row=False, num_begun=len(ids)) for one in both]

    def set_up(self, lane: "Lane", stack: ExitStack) -> None:
        """Take all that a step needs for it.

        Args:
            stack: closed when the step is over, which gives the pages back.

        Raises:
            OutOfMemoryError: when the pages are too few.
        """
        prepare(lane, self.adapter)
        # Those of the whole texts serve for their beginnings too.
        lengths = [text.num_positions for text in (*self._wholes, *self._texts[2:])]
        self._pages = stack.enter_context(lane.borrowing(*lengths))
        self._asked = Asked(lane.model, self._texts, self._pages)

    @property
    def stretches(self) -> list[Stretch]:
        """What the step runs for it."""
        return [] if self._asked is None else self._asked.stretches

    @torch.inference_mode()
    def judge(self, lane: "Lane", logits_RV: torch.Tensor) -> None:
        """Look at what the step says; it may take another one.

        Raises:
            ArtifactCorruptError: when the vocabularies differ.
            SelfCheckError: when the adapter does not prove itself.
        """
        assert self._asked is not None
        said, base_said, row, base_row = self._asked.read(logits_RV)
        check_finite_logits(torch.cat([said.begun_BV, said.last_V[None], row.last_V[None]]))
        count = min(len(said.begun_BV), len(base_said.begun_BV))
        found_BV, base_BV = said.begun_BV[:count], base_said.begun_BV[:count]
        check_row(found_BV[0], base_BV[0], row.last_V, base_row.last_V)
        if gap_between(found_BV, base_BV) <= CANARY_TOLERANCE:
            # So early rounding may leave nothing of a small change, or make one where there is none: beside
            # others the two are not in like places. In a step of their own they are.
            found, expected = ask(lane.model, self._wholes, self._pages[:2])
            check_probe(found.begun_BV, expected.begun_BV)
        check_canary(self._canary, lane.model.dtype, lambda _token_ids: said.last_V)
        self._is_right = True

    def fail(self, error: Exception) -> LuthierError:
        """Say what it failed with, and return what is told of that."""
        self.error = to_told(_LOG, "The proof of an adapter", error)
        self._tell()
        return self.error

    def end(self) -> None:
        """Tell what came of it; unless it was judged, that there will be no step for it."""
        self._asked, self._pages = None, []
        if not self._is_right and self.error is None:
            self.error = UnavailableError("The model could not be proved; try again.")
        self._tell()

    def _tell(self) -> None:
        # Two threads may give it up at once.
        with suppress(InvalidStateError):
            if self.error is None:
                self.told.set_result(None)
            else:
                self.told.set_exception(self.error)


@contextmanager
def told_of(trials: Sequence[Trial]) -> Iterator[None]:
    """Tell what came of some proofs in the end, however it comes."""
    try:
        yield
    finally:
        for trial in trials:
            trial.end()


@torch.inference_mode()
def prepare(lane: "Lane", adapter: PackedAdapter) -> None:
    """Run an adapter's input vectors, so that it has keys and values from then on.

    Args:
        lane: of its base; only its thread may call this.
        adapter: laid out on that base; one without input vectors is left as it is.

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
