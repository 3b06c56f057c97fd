"""Choosing the next token of each row from its logits.

Legend: `B` rows, `V` vocabulary.
"""

import torch

from luthier.core.errors import SelfCheckError
from luthier.inference.sequence import Choice, Sequence

# JSON knows no infinity; OpenAI's API says -9999.0 for a token that can't come.
MIN_LOGPROB = -9999.0
# Below it only the likeliest token can come; float32 would take a much smaller one for 0.
_MIN_TEMPERATURE = 1e-5


@torch.inference_mode()
def choose(logits_BV: torch.Tensor, sequences: list[Sequence]) -> list[Choice]:
    """Choose a token for every row.

    A row's choice depends on its own logits, options and generator only, so a seed gives the same answer
    in any batch.

    Args:
        logits_BV: float32 [B, V], on any device.
        sequences: the B rows' sequences.

    Returns:
        B choices, with log-probabilities where a sequence asks for them.

    Raises:
        SelfCheckError: when a row's logits are not finite.
    """
    largest_B, ids_B = logits_BV.max(dim=-1)
    # A NaN anywhere in a row is its maximum; the greedy choice alone would hide it.
    if not bool(torch.isfinite(largest_B).all()):
        raise SelfCheckError("The model's logits are not finite; the answer was stopped.")
    best_B = ids_B.tolist()
    choices = []
    for row, sequence in enumerate(sequences):
        logits_V = logits_BV[row]
        token_id = best_B[row] if sequence.options.temperature == 0.0 else _draw(logits_V, sequence)
        choices.append(_with_logprobs(token_id, logits_V, sequence.options.num_logprobs))
    return choices


def _draw(logits_V: torch.Tensor, sequence: Sequence) -> int:
    options = sequence.options
    if sequence.generator is None:
        sequence.generator = torch.Generator(device=logits_V.device)
        if options.seed is None:
            sequence.generator.seed()
        else:
            sequence.generator.manual_seed(options.seed)
    # The largest becomes 0 before the division, so that a tiny temperature can't overflow.
    probs_V = torch.softmax((logits_V - logits_V.max()) / max(options.temperature, _MIN_TEMPERATURE), dim=-1)
    if options.top_p < 1.0:
        probs_V = _nucleus(probs_V, options.top_p)
    return int(torch.multinomial(probs_V, 1, generator=sequence.generator))


def _nucleus(probs_V: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero all but the fewest likeliest tokens whose mass reaches `top_p`, at least one (Holtzman et al.
    2020, section 3.1). The order of the vocabulary is kept, so the draw's noise stays with its tokens."""
    sorted_V, order_V = probs_V.sort(descending=True)
    mass_before_V = sorted_V.cumsum(dim=-1) - sorted_V
    is_out_V = mass_before_V >= top_p
    is_out_V[0] = False
    return probs_V.masked_fill(torch.zeros_like(is_out_V).scatter(0, order_V, is_out_V), 0.0)


def _with_logprobs(token_id: int, logits_V: torch.Tensor, num_logprobs: int | None) -> Choice:
    if num_logprobs is None:
        return Choice(token_id)
    logprobs_V = torch.log_softmax(logits_V, dim=-1).clamp_min(MIN_LOGPROB)
    top: tuple[tuple[int, float], ...] = ()
    if num_logprobs > 0:
        values, ids = logprobs_V.topk(min(num_logprobs, logprobs_V.shape[-1]))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Choice(token_id, float(logprobs_V[token_id]), top)
