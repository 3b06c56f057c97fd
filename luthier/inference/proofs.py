"""What an artifact must prove before it answers anybody, whatever its method and wherever it lies.

Legend: `V` vocabulary.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from luthier.core.errors import ArtifactCorruptError, SelfCheckError
from luthier.storage.manifests import Manifest, read_manifest


def check_base(folder: Path, base_digest: str) -> Manifest:
    """Check that an artifact was trained on a base.

    Args:
        folder: the artifact's verified folder.
        base_digest: the base's digest.

    Returns:
        The artifact's manifest.

    Raises:
        ArtifactCorruptError: when its manifest names another base.
    """
    manifest = read_manifest(folder)
    if manifest.base_digest != base_digest:
        raise ArtifactCorruptError("The artifact was trained on another version of the base model.")
    return manifest


def check_finite_weights(folder: Path, names: list[str]) -> None:
    """Check every tensor of an artifact; a probe alone may not meet a value that is not finite.

    Args:
        folder: the artifact's folder.
        names: names of its files; those that are not safetensors hold no weights.

    Raises:
        ArtifactCorruptError: when a file can't be read.
        SelfCheckError: when a value is not finite.
    """
    for name in names:
        if not name.endswith(".safetensors"):
            continue
        try:
            with safe_open(folder / name, framework="pt") as stored:
                are_finite = all(
                    bool(torch.isfinite(stored.get_tensor(tensor)).all())
                    for tensor in stored.keys()  # noqa: SIM118 - not a dict
                )
        except (SafetensorError, OSError) as error:
            raise ArtifactCorruptError("The artifact's weights can't be read.") from error
        if not are_finite:
            raise SelfCheckError("The model's weights are not finite; it is not served.")


def check_probe(logits_V: torch.Tensor, base_logits_V: torch.Tensor) -> None:
    """Check what a model says about a short text beside what its base says.

    Args:
        logits_V: the model's, float32.
        base_logits_V: the base's, float32.

    Raises:
        ArtifactCorruptError: when the vocabularies differ.
        SelfCheckError: when the model's logits are not finite, or are those of the base.
    """
    if logits_V.shape != base_logits_V.shape:
        raise ArtifactCorruptError("The artifact has another vocabulary than its base.")
    if not bool(torch.isfinite(logits_V).all()):
        raise SelfCheckError("The model's logits are not finite; it is not served.")
    if torch.equal(logits_V, base_logits_V):
        raise SelfCheckError("The model's artifact changes nothing about its base; it is not served.")
