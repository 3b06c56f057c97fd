"""Verification of a result: it changes the logits, and what was saved gives the same. Records the canary.

Beside the trained model only one more may come into memory: for a whole model the saved one, which has to
be read in any case; for all other methods a second skeleton over the frozen weights of the first.
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from luthier.core.errors import SelfCheckError
from luthier.core.specs import MOST_ROUNDING, Canary
from luthier.modeling.training_protocols import Batch
from luthier.training.model.agreement import ComputesInFloat32, relative_gap
from luthier.training.model.training_model import JobModel

# Reloaded weights are the same bytes, so only the order of sums could differ.
_TOLERANCE = 1e-4


@torch.no_grad()
def check_artifact(model: JobModel, folder: Path, sample: Batch) -> None:
    """Load a saved artifact as its users will and compare its logits with the trained model's.

    Raises:
        SelfCheckError: when weights or logits are not finite, when the artifact gives the base's logits, or
            when it gives others than the trained model.
    """
    if not all(torch.isfinite(parameter).all() for parameter in model.parameters):
        raise SelfCheckError("The trained weights are not all finite. Use a lower learning rate.")
    method = model.method
    with model.evaluation_mode():
        if model.start_logits_BTV is None:
            bare = bare_base(model)
            token_ids_BT = sample.token_ids_BT.to(model.device)
            base = bare(input_ids=token_ids_BT, use_cache=False).logits
            loaded = method.load(bare, folder)
        else:
            # What the model was before it was overwritten is known for this sample alone.
            sample, base = model.sample, model.start_logits_BTV
            token_ids_BT = sample.token_ids_BT
            loaded = method.load(model.attached.causal_lm, folder)
        tuned = model.logits(sample)
    if model.parent_logits_BTV is not None and torch.equal(tuned, model.parent_logits_BTV):
        raise SelfCheckError("The result gives the logits of the model it started from: nothing was learned.")
    _compare(tuned, base, method.logits(loaded, token_ids_BT))


def bare_base(model: JobModel) -> PreTrainedModel:
    """Build the base below a tuned model, without the method and without a copy of a weight.

    Returns:
        The base in evaluation mode; its parameters are the model's own, so they must not be changed.
    """
    causal_lm = model.attached.causal_lm
    with torch.device("meta"):
        bare: PreTrainedModel = type(causal_lm)(causal_lm.config)
    tensors = {
        # PEFT keeps a layer that it wraps under this name.
        name.replace(".base_layer.", "."): tensor
        for source in (
            causal_lm.named_parameters(remove_duplicate=False),
            causal_lm.named_buffers(remove_duplicate=False),
        )
        for name, tensor in source
    }
    # Weights of two names are one parameter here as there.
    weights = {id(one): torch.nn.Parameter(one.detach(), requires_grad=False) for one in tensors.values()}
    for name, _ in list(bare.named_parameters(remove_duplicate=False)):
        owner, _, attribute = name.rpartition(".")
        setattr(bare.get_submodule(owner), attribute, weights[id(tensors[name])])
    for name, _ in list(bare.named_buffers(remove_duplicate=False)):
        owner, _, attribute = name.rpartition(".")
        bare.get_submodule(owner)._buffers[attribute] = tensors[name]
    return bare.eval()


def _compare(tuned: torch.Tensor, base: torch.Tensor, reloaded: torch.Tensor) -> None:
    if not torch.isfinite(tuned).all():
        raise SelfCheckError("The tuned model's logits are not finite. Use a lower learning rate.")
    if torch.equal(tuned, base):
        raise SelfCheckError("The result gives the base's own logits: nothing was learned.")
    if not logits_agree(tuned, reloaded):
        gap = (tuned.float() - reloaded.float()).abs().max().item()
        raise SelfCheckError(f"The saved result gives other logits than the trained model (by {gap:.3g}).")


def logits_agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether two models of equal weights gave equal logits, but for the order of sums."""
    gap = (found.float() - expected.float()).abs().max().item()
    return bool(gap <= _TOLERANCE * max(1.0, found.abs().max().item()))


# A server computes them, and four more, before a model is ready.
_NUM_TOKENS = 4
_NUM_CANDIDATES = 32


@torch.no_grad()
def record_canary(model: JobModel, general_ids: list[int]) -> Canary:
    """Run a short text, which no user wrote, on the model as it is now.

    Raises:
        SelfCheckError: when the logits are not finite.
    """
    causal_lm = model.attached.causal_lm
    token_ids = general_ids[:_NUM_TOKENS]
    with model.evaluation_mode():
        ids_1T = torch.tensor([token_ids], device=causal_lm.device)
        own_V = model.method.logits(model.attached, ids_1T)[0, -1]
        with ComputesInFloat32():
            logits_V = model.method.logits(model.attached, ids_1T)[0, -1]
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
