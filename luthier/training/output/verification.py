"""Proofs that a result is one: it changes the logits, and what was saved gives the same logits.

Beside the trained model only one more may come into memory: for a whole model the saved one, which has to
be read in any case; for all other methods a second skeleton over the frozen weights of the first.
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from luthier.core.errors import SelfCheckError
from luthier.modeling.protocols import Batch
from luthier.training.model.training_model import JobModel

# Reloaded weights are the same bytes, so only the order of sums could differ.
_TOLERANCE = 1e-4


@torch.no_grad()
def check_artifact(trainee: JobModel, folder: Path, sample: Batch) -> None:
    """Load a saved artifact as its users will and compare its logits with the trained model's.

    Args:
        trainee: the model at the end of training; unchanged afterwards.
        folder: the artifact as it was written.

    Raises:
        SelfCheckError: when weights or logits are not finite, when the artifact gives the base's logits, or
            when it gives others than the trained model.
    """
    if not all(torch.isfinite(parameter).all() for parameter in trainee.parameters):
        raise SelfCheckError("The trained weights are not all finite. Use a lower learning rate.")
    method, model = trainee.method, trainee.attached.model
    was_training = model.training
    model.eval()
    try:
        if trainee.start_logits_BTV is None:
            bare = bare_base(trainee)
            token_ids_BT = sample.token_ids_BT.to(trainee.device)
            base = bare(input_ids=token_ids_BT, use_cache=False).logits
            loaded = method.load(bare, folder)
        else:
            # What the model was before it was overwritten is known for this sample alone.
            sample, base = trainee.sample, trainee.start_logits_BTV
            token_ids_BT = sample.token_ids_BT
            loaded = method.load(trainee.attached.causal_lm, folder)
        tuned = trainee.logits(sample)
    finally:
        model.train(was_training)
    if trainee.parent_logits_BTV is not None and torch.equal(tuned, trainee.parent_logits_BTV):
        raise SelfCheckError("The result gives the logits of the model it started from: nothing was learned.")
    _compare(tuned, base, method.logits(loaded, token_ids_BT))


def bare_base(trainee: JobModel) -> PreTrainedModel:
    """Build the base that a trainee's model lies on, without the method and without a copy of a weight.

    Returns:
        The base in evaluation mode; its parameters are the trainee's own, so they must not be changed.
    """
    causal_lm = trainee.attached.causal_lm
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
