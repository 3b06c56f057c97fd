"""Artifacts that are models of their own: read from their folder and proved, with weights of their own."""

from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from luthier.core.errors import ArtifactCorruptError, BaseUnavailableError
from luthier.core.shapes import read_tensor_shapes
from luthier.inference.proofs import (
    check_base,
    check_canary,
    check_finite_weights,
    check_probe,
    read_canary,
)
from luthier.inference.slots import probe
from luthier.inference.weights import load_weights


def measure_whole(folder: Path, dtype: torch.dtype) -> int:
    """Return how many bytes a whole model's weights will take in memory.

    Raises:
        ArtifactCorruptError: when a weights file has no header that can be read.
    """
    try:
        num_values = sum(
            prod(shape)
            for path in folder.glob("*.safetensors")
            for shape in read_tensor_shapes(path).values()
        )
    except (OSError, SafetensorError) as error:
        raise ArtifactCorruptError("The artifact's weights can't be read.") from error
    if num_values == 0:
        raise ArtifactCorruptError("The artifact has no weights.")
    return num_values * dtype.itemsize


def load_whole(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    base_digest: str,
) -> PreTrainedModel:
    """Load a whole model, which is still to prove itself. Takes seconds; any thread may call it.

    Args:
        dtype: the type to serve in, whatever was trained in.
        device: where to serve.
        base_digest: the digest of the base that it was made from.

    Returns:
        The model in evaluation mode.

    Raises:
        ArtifactCorruptError: when its files don't fit each other or the base.
        SelfCheckError: when weights are not finite.
    """
    manifest = check_base(folder, base_digest)
    check_finite_weights(folder, manifest.digested)
    try:
        return load_weights(folder, dtype=dtype, device=device, refuse_extra=True)
    except (RuntimeError, TypeError, IndexError, BaseUnavailableError) as error:
        raise ArtifactCorruptError("The artifact can't be loaded as a model.") from error


def prove_whole(
    model: PreTrainedModel, folder: Path, probe_ids: list[int], base_logits_V: torch.Tensor
) -> None:
    """Let a whole model prove itself on the plain path, where that is the one that will answer.

    Args:
        model: what `load_whole` returned.
        folder: where it lay.
        probe_ids: tokens of a short text.
        base_logits_V: what the base says after it, float32.

    Raises:
        ArtifactCorruptError: when it can't run.
        SelfCheckError: when its logits are not finite, are those of the base, or not those that training
            recorded.
    """
    try:
        logits_V = probe(model, probe_ids, ())
    except (RuntimeError, TypeError, IndexError) as error:
        raise ArtifactCorruptError("The artifact can't be loaded as a model.") from error
    check_probe(logits_V, base_logits_V)
    check_canary(read_canary(folder), model.dtype, lambda token_ids: probe(model, token_ids, ()))
