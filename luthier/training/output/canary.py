"""Recording a canary: what the trained model says after the beginning of the bundled general text.

Legend: T tokens, V vocabulary.
"""

import torch

from luthier.core.errors import SelfCheckError
from luthier.core.specs import MOST_ROUNDING, Canary
from luthier.training.model.agreement import ComputesInFloat32, relative_gap
from luthier.training.model.training_model import JobModel

# A server computes them, and four more, before a model is ready.
_NUM_TOKENS = 4
_NUM_CANDIDATES = 32


@torch.no_grad()
def record_canary(trainee: JobModel, general_ids: list[int]) -> Canary:
    """Run a short text on the model as it is now.

    Args:
        trainee: the model; unchanged afterwards.
        general_ids: tokens of a text that no user wrote.

    Raises:
        SelfCheckError: when the logits are not finite.
    """
    model, causal_lm = trainee.attached.model, trainee.attached.causal_lm
    token_ids = general_ids[:_NUM_TOKENS]
    was_training = model.training
    model.eval()
    try:
        ids_1T = torch.tensor([token_ids], device=causal_lm.device)
        own_V = trainee.method.logits(trainee.attached, ids_1T)[0, -1]
        with ComputesInFloat32():
            logits_V = trainee.method.logits(trainee.attached, ids_1T)[0, -1]
    finally:
        model.train(was_training)
    if not bool(torch.isfinite(own_V).all() and torch.isfinite(logits_V).all()):
        raise SelfCheckError("The tuned model's logits are not finite. Use a lower learning rate.")
    values, candidates = logits_V.topk(min(_NUM_CANDIDATES, len(logits_V)))
    return Canary(
        token_ids=token_ids,
        candidates=candidates.tolist(),
        logits=values.tolist(),
        precision=str(causal_lm.dtype).removeprefix("torch."),
        rounding=min(relative_gap(own_V[candidates], values), MOST_ROUNDING),
    )
