"""Logits of a batch and the likeliest tokens: `protocols.Logits` over a tensor.

Legend: R rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from luthier_cpu.decode.sampling import draw, find_best


@dataclass(frozen=True)
class Logits:
    """Logits of rows, and the likeliest token of each.

    `held_RV` are in the weights' type and may be overwritten by the next step. `best` holds the likeliest
    tokens, of equals the first, and `choosing.UNSOUND` where a row's
    largest logit is not finite or one is NaN.
    """

    held_RV: torch.Tensor
    best: list[int]

    @classmethod
    def of(cls, held_RV: torch.Tensor) -> "Logits":
        """Find the likeliest token of each row."""
        held_RV = held_RV.contiguous()
        best_R = torch.empty(len(held_RV), dtype=torch.int64)
        return cls(held_RV, find_best(held_RV, best_R).tolist())

    def greedy(self) -> list[int]:
        """Return the likeliest token of each row."""
        return self.best

    def draw(
        self,
        rows: Sequence[int],
        *,
        temperatures: Sequence[float],
        top_p: Sequence[float],
        points: Sequence[float],
    ) -> list[int | None]:
        """Draw a token of each of some finite rows; None where its nucleus is too wide for the kernel."""
        best = [self.best[row] for row in rows]
        return draw(self.held_RV, rows, best, temperatures=temperatures, top_p=top_p, points=points)

    def rows(self, rows: Sequence[int]) -> torch.Tensor:
        """Return some rows as float32."""
        if len(rows) == 1:
            # A view where the type allows.
            return self.held_RV[rows[0]].float()[None]
        return self.held_RV[list(rows)].float()
