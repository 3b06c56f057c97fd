"""How likely a prompt's own tokens were, from the logits of its stretches. Chooses nothing.

Legend: `T` tokens of a stretch, `V` vocabulary, `K` the likeliest tokens.
"""

import logging

import torch

from luthier.core.errors import SelfCheckError
from luthier.inference.engine.error_reporting import to_told
from luthier.inference.engine.sampler import MIN_LOGPROB
from luthier.inference.engine.sequence import Choice, Sequence

_LOG = logging.getLogger(__name__)


def score_stretch(sequence: Sequence, first: int, logits_TV: torch.Tensor) -> None:
    """Tell a sequence the log-probabilities of the prompt's tokens that come after those of a stretch.

    Args:
        sequence: one that wants them; what can't be scored ends it with an error, as in an answer.
        first: where in the prompt the stretch begins.
        logits_TV: float32, after each of its tokens; what they say of the answer's first token is not used.
    """
    if sequence.is_done:
        return
    try:
        _score(sequence, first, logits_TV)
    except Exception as error:  # noqa: BLE001 - a fault of one row is not one of the others
        sequence.fail(to_told(_LOG, "Scoring a prompt, whose answer ends with an error,", error))


def _score(sequence: Sequence, first: int, logits_TV: torch.Tensor) -> None:
    if not bool(torch.isfinite(logits_TV.max(dim=-1).values).all()):
        raise SelfCheckError("The model's logits are not finite; the answer was stopped.")
    followers = sequence.prompt_ids[first + 1 : first + 1 + len(logits_TV)]
    choices = _choices(followers, logits_TV[: len(followers)], sequence.options.num_prompt_logprobs or 0)
    if first > 0:
        sequence.take_prompt_choices(first + 1, choices)
    else:
        # Nothing comes before the first token that it could be likely after.
        sequence.take_prompt_choices(0, [Choice(sequence.prompt_ids[0]), *choices])


def _choices(token_ids: list[int], logits_TV: torch.Tensor, num_top: int) -> list[Choice]:
    if not token_ids:
        return []
    logprobs_TV = torch.log_softmax(logits_TV, dim=-1).clamp_min(MIN_LOGPROB)
    ids_T1 = torch.tensor(token_ids, device=logits_TV.device).unsqueeze(1)
    own = logprobs_TV.gather(1, ids_T1).squeeze(1).tolist()
    if num_top == 0:
        return [Choice(token_id, logprob) for token_id, logprob in zip(token_ids, own, strict=True)]
    values_TK, ids_TK = logprobs_TV.topk(min(num_top, logprobs_TV.shape[-1]), dim=-1)
    tops = zip(ids_TK.tolist(), values_TK.tolist(), strict=True)
    return [
        Choice(token_id, logprob, tuple(zip(ids, values, strict=True)))
        for token_id, logprob, (ids, values) in zip(token_ids, own, tops, strict=True)
    ]
