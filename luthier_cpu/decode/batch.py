"""What a step of a packed base is given, and what it works in.

Legend: N tokens of a step (M single ones first, then T of each chunk), D hidden size, E columns of q, k
and v, K attended columns, F feed-forward size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from luthier_cpu.decode.batch_layout import (
    AdapterDescriptor,
    ChunkRows,
    SingleRows,
    TokenRows,
    region_entry,
)


@dataclass(eq=False, slots=True)
class Chunk:
    """Tokens of one sequence that are run now.

    `tokens` are ids, or vectors [T, D] in their place; `first` is the position of the first, and all before
    it are in `pages`, which reach to the last. `adapter` is that of these rows. Logits are wanted after its
    last token, after all of them, or not at all, and after some of its first tokens besides. `by_rows` says
    that its tokens are few and run as single rows do, where a step is a program.
    """

    tokens: Sequence[int] | torch.Tensor
    first: int
    pages: Sequence[int]
    adapter: AdapterDescriptor | None = None
    wants_logits: bool = True
    wants_all_logits: bool = False
    num_first_logits: int = 0
    by_rows: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_logits(self) -> int:
        """Rows of logits that it gets."""
        # Not by the places themselves, which would be made to be counted.
        return len(self.tokens) if self.wants_all_logits else self.num_first_logits + int(self.wants_logits)

    @property
    def wanted(self) -> list[int]:
        """The places of its tokens after which logits are wanted, in order."""
        count = len(self.tokens)
        if self.wants_all_logits:
            return list(range(count))
        return [*range(self.num_first_logits), *([count - 1] if self.wants_logits else [])]


@dataclass(frozen=True, eq=False)
class Buffers:
    """What a step's layers read and write, used by all of them in turn."""

    stream_ND: torch.Tensor
    normed_ND: torch.Tensor
    attended_NK: torch.Tensor
    hidden_NF: torch.Tensor
    # What products write; None where they return memory of their own.
    change_ND: torch.Tensor | None
    qkv_NE: torch.Tensor | None
    gate_up_NF: torch.Tensor | None

    def first(self, num_rows: int) -> "Buffers":
        """Return those of a step with fewer rows, in the same memory."""
        held = (getattr(self, one.name) for one in fields(self))
        return Buffers(*(None if one is None else one[:num_rows] for one in held))


@dataclass(frozen=True, eq=False)
class StepInputs:
    """What a step runs: single rows first, then the tokens of chunks, if there are any."""

    rows: SingleRows
    tokens: TokenRows
    chunks: ChunkRows | None = None

    def following(self, layer: int, sites: slice) -> tuple[int, int]:
        """Return what a product of all tokens with weights of a layer prefetches: the updates after it."""
        if self.chunks is not None or not self.rows.has_low_ranks:
            return 0, 0
        return self.rows.table_M.data_ptr(), region_entry(layer, sites)
