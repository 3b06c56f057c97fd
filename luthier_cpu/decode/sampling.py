"""Logits of a batch (`protocols.Logits`): the likeliest token of each row, and tokens drawn by probability.

Legend: R rows, M of them, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from luthier_cpu.codegen import kernels
from luthier_cpu.codegen.openmp import launch

# Stands for the token of a row whose largest logit is not finite, or that has one that is no number.
UNSOUND = -1
# Numbers whose masses are added up at a time.
BLOCK = 256
# Most nuclei are within this many nats of the likeliest token: those with at least that share of its
# probability, and at most this many of them, are looked at.
NUCLEUS_NATS = 10.0
LEAST_LIKELY, _MOST_LIKELY = math.exp(-NUCLEUS_NATS), 16384


def find_best(logits_RV: torch.Tensor, out_R: torch.Tensor) -> torch.Tensor:
    """Write the likeliest token of each row, of equals the first, and `UNSOUND` where there is none.

    Args:
        out_R: int64, contiguous.

    Raises:
        ValueError: when the result does not fit.
    """
    num_rows, size = logits_RV.shape
    is_like = out_R.shape == (num_rows,) and out_R.dtype == torch.int64 and kernels.is_compiled(logits_RV)
    if not (is_like and logits_RV.is_contiguous() and out_R.is_contiguous()):
        raise ValueError("The likeliest tokens are int64, one a row of whole contiguous logits.")
    address = kernels.compiled_address("find_best", logits_RV.dtype)
    launch(address, (num_rows, size, logits_RV.data_ptr(), out_R.data_ptr()))
    return out_R


def draw(
    logits_RV: torch.Tensor,
    rows: Sequence[int],
    best: Sequence[int],
    *,
    temperatures: Sequence[float],
    top_p: Sequence[float],
    points: Sequence[float],
) -> list[int | None]:
    """Draw a token of some rows from the softmax of their logits over a temperature.

    A row's token depends on what is given for it alone.

    Args:
        best: their likeliest tokens; all of these are finite.
        temperatures: above 0.
        top_p: of the mass; below 1 a token is drawn from the fewest likeliest that reach it, at least one
            (Holtzman et al. 2020, section 3.1).
        points: a uniform number of [0, 1) each: the token is the one at which the mass up to it, in the
            vocabulary's order, or the likeliest first where these alone are drawn from, passes that share.

    Returns:
        M tokens, None where a nucleus is too wide to be found here.

    Raises:
        ValueError: when the logits are not such, or a row or token is none of them.
    """
    num_rows, size = logits_RV.shape
    are_there = all(0 <= row < num_rows for row in rows) and all(0 <= token < size for token in best)
    are_alike = len(rows) == len(best) == len(temperatures) == len(top_p) == len(points)
    is_readable = kernels.is_compiled(logits_RV) and logits_RV.is_contiguous()
    if not (is_readable and are_there and are_alike):
        raise ValueError("Tokens are drawn of rows of whole contiguous logits on the CPU.")
    rows_M, best_M = torch.tensor(rows, dtype=torch.int64), torch.tensor(best, dtype=torch.int64)
    inverse_M = torch.tensor([1.0 / one for one in temperatures], dtype=torch.float32)
    point_M, share_M = (torch.tensor(one, dtype=torch.float64) for one in (points, top_p))
    drawn_M = torch.empty(len(rows), dtype=torch.int64)
    masses_MK = torch.empty(len(rows), -(-size // BLOCK), dtype=torch.float64)
    num_likely = min(size, _MOST_LIKELY) if min(top_p, default=1.0) < 1.0 else 1
    ids_MC = torch.empty(len(rows), num_likely, dtype=torch.int64)
    mass_MC = torch.empty(len(rows), num_likely, dtype=torch.float32)
    inputs = (logits_RV, rows_M, best_M, inverse_M, point_M, share_M, drawn_M, masses_MK)
    addresses = [one.data_ptr() for one in inputs]
    address = kernels.compiled_address("draw", logits_RV.dtype)
    launch(address, (len(rows), size, *addresses, num_likely, ids_MC.data_ptr(), mass_MC.data_ptr()))
    return [None if token_id < 0 else token_id for token_id in drawn_M.tolist()]


@dataclass(frozen=True)
class Logits:
    """Logits of rows, and the likeliest token of each.

    `held_RV` are in the weights' type and may be overwritten by the next step. `best` holds the likeliest
    tokens, of equals the first, and `UNSOUND` where a row's
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
