"""Proofs that a result is one: it changes the logits, and what was saved gives the same logits."""

from pathlib import Path

import torch

from luthier.core.errors import SelfCheckError
from luthier.training.batches import Batch
from luthier.training.trainee import Trainee

# Reloaded weights are the same bytes, so only the order of sums could differ.
_TOLERANCE = 1e-4
_PROBE = "probe"


@torch.no_grad()
def check_artifact(trainee: Trainee, folder: Path, sample: Batch) -> None:
    """Reload a saved adapter beside the trained one and compare logits on a few rows.

    Args:
        trainee: the model at the end of training; unchanged afterwards.
        folder: the artifact as it was written.
        sample: rows to compare on.

    Raises:
        SelfCheckError: when weights or logits are not finite, when the adapter leaves the base's logits as
            they were, or when the reloaded adapter gives others than the trained one.
    """
    if not all(torch.isfinite(parameter).all() for parameter in trainee.parameters):
        raise SelfCheckError("The adapter's weights are not all finite. Use a lower learning rate.")
    model = trainee.attached.model
    was_training = model.training
    model.eval()
    try:
        tuned = trainee.logits(sample).float()
        with model.disable_adapter():
            base = trainee.logits(sample).float()
        model.load_adapter(str(folder), _PROBE, is_trainable=False, local_files_only=True)
        model.set_adapter(_PROBE)
        reloaded = trainee.logits(sample).float()
    finally:
        model.set_adapter("default")
        if _PROBE in model.peft_config:
            model.delete_adapter(_PROBE)
        model.train(was_training)
    if not torch.isfinite(tuned).all():
        raise SelfCheckError("The tuned model's logits are not finite. Use a lower learning rate.")
    if torch.equal(tuned, base):
        raise SelfCheckError("The adapter leaves the base's logits unchanged: nothing was learned.")
    gap = (tuned - reloaded).abs().max().item()
    if gap > _TOLERANCE * max(1.0, tuned.abs().max().item()):
        raise SelfCheckError(f"The saved adapter gives other logits than the trained one (by {gap:.3g}).")
