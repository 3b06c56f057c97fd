"""What a step of a packed base says of its rows' next tokens.

Legend: R rows, V vocabulary.
"""

from dataclasses import dataclass

import torch

from luthier.modeling.kernels.choosing import find_best


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
        best_R = torch.empty(len(held_RV), dtype=torch.int64, device=held_RV.device)
        return cls(held_RV, find_best(held_RV, best_R).tolist())

    def row(self, index: int) -> torch.Tensor:
        """Return one row's logits as float32."""
        return self.held_RV[index].float()
