"""Checks of an artifact's files and logits, of any method and on any runner.

Legend: `V` vocabulary.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from luthier.core.errors import ArtifactCorruptError, SelfCheckError
from luthier.core.specs import CANARY_NAME, Canary
from luthier.storage.manifests import Manifest, read_manifest

# How far served logits may be from recorded ones, as the norm of the gap relative to that of the logits. In
# bfloat16 on either side rounding alone makes about 0.02; another adapter, or a wrong scale, makes more than
# the larger number wherever it changes answers at all.
CANARY_TOLERANCE = 1e-3
_ROUNDED_CANARY_TOLERANCE = 0.1


def check_base(folder: Path, base_digest: str) -> Manifest:
    """Check that an artifact was trained on a base."""
    manifest = read_manifest(folder)
    if manifest.base_digest != base_digest:
        raise ArtifactCorruptError("The artifact was trained on another version of the base model.")
    return manifest


def check_finite_weights(folder: Path, names: list[str]) -> None:
    """Check every tensor of an artifact; a probe alone may not meet a value that is not finite.

    Args:
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
                check_finite(stored.get_tensor(tensor) for tensor in stored.keys())  # noqa: SIM118 - no dict
        except (SafetensorError, OSError) as error:
            raise ArtifactCorruptError("The artifact's weights can't be read.") from error


def check_finite(tensors: Iterable[torch.Tensor]) -> None:
    """Check every number of some weights.

    Raises:
        SelfCheckError: when a value is not finite.
    """
    for tensor in tensors:
        # The sum is not finite if a value is not, and takes one pass; a finite tensor may overflow it.
        if not bool(tensor.sum(dtype=torch.float32).isfinite()) and not bool(tensor.isfinite().all()):
            raise SelfCheckError("The model's weights are not finite; it is not served.")


def read_canary(folder: Path) -> Canary | None:
    """Return what training recorded of a model, None for artifacts that are older than canaries.

    Raises:
        ArtifactCorruptError: when the file is no canary.
    """
    path = folder / CANARY_NAME
    if not path.exists():
        return None
    try:
        canary = Canary.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise ArtifactCorruptError("What training recorded of the model can't be read.") from error
    if not canary.token_ids or not canary.candidates or len(canary.candidates) != len(canary.logits):
        raise ArtifactCorruptError("What training recorded of the model can't be read.")
    return canary


def check_canary(canary: Canary | None, dtype: torch.dtype, run: Callable[[list[int]], torch.Tensor]) -> None:
    """Check that a model says what it said when it was trained."""
    if canary is None:
        return
    logits_V = run(canary.token_ids).cpu()
    if max(canary.candidates) >= len(logits_V) or min(canary.candidates) < 0:
        raise ArtifactCorruptError("The artifact has another vocabulary than its base.")
    gap = gap_between(logits_V[canary.candidates], torch.tensor(canary.logits, dtype=torch.float32))
    is_exact = dtype is torch.float32 and canary.precision == "float32"
    if not gap <= (CANARY_TOLERANCE if is_exact else _largest_rounded_gap(canary)):
        raise SelfCheckError(
            f"The model does not say what training recorded of it (logits {gap:.2g} apart); it is not served."
        )


def gap_between(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the gap between logits, relative to the norm of those expected."""
    return float((found - expected).norm() / expected.norm())


def _largest_rounded_gap(canary: Canary) -> float:
    return max(_ROUNDED_CANARY_TOLERANCE, canary.allowed_rounding)


def check_row(
    begun_V: torch.Tensor, base_begun_V: torch.Tensor, row_V: torch.Tensor, base_row_V: torch.Tensor
) -> None:
    """Check that a decoded token, which other kernels run, has the adapter that a prefilled one has.

    Args:
        begun_V: what the model says after a text's first token, float32.
        row_V: what the model says after the same token as a row by itself.
    """
    # Of a smaller change rounding may leave nothing on one of the ways.
    if gap_between(begun_V, base_begun_V) > CANARY_TOLERANCE and torch.equal(row_V, base_row_V):
        raise SelfCheckError("Token by token the base answers for the model; it is not served.")


def check_probe(logits_V: torch.Tensor, base_logits_V: torch.Tensor) -> None:
    """Check what a model says about a short text beside what its base says.

    Raises:
        ArtifactCorruptError: when the vocabularies differ.
        SelfCheckError: when the model's logits are not finite, or are those of the base.
    """
    if logits_V.shape != base_logits_V.shape:
        raise ArtifactCorruptError("The artifact has another vocabulary than its base.")
    check_finite_logits(logits_V)
    if torch.equal(logits_V, base_logits_V):
        raise SelfCheckError("The model's artifact changes nothing about its base; it is not served.")


def check_finite_logits(logits_V: torch.Tensor) -> None:
    """Check that a model says numbers."""
    if not bool(torch.isfinite(logits_V).all()):
        raise SelfCheckError("The model's logits are not finite; it is not served.")
