"""Whether two ways to compute the same results differ by rounding alone.

Two paths through one model in bf16 part by what either rounds. How far depends on the weights: layers may
amplify a rounding, and then the gap of right paths exceeds any fixed bound that would still find a wrong
one. So where a cheap comparison says no, float32 decides: a path is right that comes about as near to
it as the other path does.
"""

from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

# Gaps that need no further proof: three quarters of the tokens within the first number, all of them together
# within the second, as the norm of the gap relative to the norm of the results. In bf16 either path is
# usually about 0.03 away from float32; a wrong path would be near 1.
_TOLERANCES = {torch.float32: (1e-4, 1e-4), torch.bfloat16: (0.1, 0.2), torch.float16: (0.1, 0.2)}
# Two right paths round at different places, and where a few tokens amplify it most, chance says which of the
# two is nearer to float32. What was measured of right ones was up to 1.4 times as far as the plain path.
_LARGEST_RATIO = 2.0
# Beyond it the reference path's own results are mostly rounding, and too little follows from them.
_LARGEST_GAP = 0.25

# Types that `ComputesInFloat32` makes more exact.
LOW_PRECISION = (torch.bfloat16, torch.float16)
_GATHERS = (functional.embedding, torch.embedding)


def agrees(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two results are so near each other that nothing but rounding can part them.

    Both are [..., D], a token's results along the last axis; the type of `expected` decides the tolerance.
    False also where a result is not finite.
    """
    most, all_of_them = _TOLERANCES[expected.dtype]
    by_token, together = _gaps(found, expected)
    return together <= all_of_them and by_token <= most


def is_as_exact(found: torch.Tensor, expected: torch.Tensor, exact: torch.Tensor) -> bool:
    """Whether results come about as near to the exact ones as the reference path's do.

    All are [..., D]: of the path in question, of the reference path, and of the reference path in float32.
    False also where a result is not finite, or the reference path's own are too far from the exact ones to
    decide by.
    """
    own_gaps = _gaps(expected, exact)
    return all(
        own <= _LARGEST_GAP and gap <= _LARGEST_RATIO * own
        for gap, own in zip(_gaps(found, exact), own_gaps, strict=True)
    )


def relative_gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the gap between two results, relative to that of the expected ones."""
    expected = expected.float()
    return float((found.float() - expected).norm() / expected.norm().clamp_min(1e-30))


def _gaps(found: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Return the relative gap that three quarters of the tokens are within, and that of all together."""
    gap = (found.float() - expected.float()).norm(dim=-1)
    by_token = gap / expected.float().norm(dim=-1).clamp_min(1e-30)
    return float(by_token.flatten().quantile(0.75)), relative_gap(found, expected)


class ComputesInFloat32(TorchFunctionMode):
    """While it is entered, torch computes in float32 what it would in bf16 or float16.

    Every operation gets its low-precision operands widened, and a cast to such a type is one to float32. So
    a model gives the results of its weights as they are without a copy of it in float32: one operation's
    operands at a time are widened. For inference alone; what is written in place into a low-precision tensor
    is lost.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation of torch with wide operands."""
        if func in _GATHERS:
            # Rows are picked as they are, and a whole vocabulary is not widened for a few of them.
            return _widened(func(*args, **(kwargs or {})))
        args, kwargs = torch.utils._pytree.tree_map(_widened, (args, kwargs or {}))
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.float() if value.dtype in LOW_PRECISION else value
    return torch.float32 if value in LOW_PRECISION else value
