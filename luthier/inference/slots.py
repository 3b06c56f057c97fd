"""Artifacts that lie on one base in memory, of any method, proved before they answer.

Legend: `V` vocabulary.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from luthier.core.errors import ArtifactCorruptError, InvalidRequestError, SelfCheckError
from luthier.inference.forward import Prefix, run_prompts
from luthier.inference.proofs import (
    check_base,
    check_canary,
    check_finite_weights,
    check_probe,
    read_canary,
)
from luthier.methods import Installed, method_of_artifact

# What it looks like when an artifact does not fit its base. InvalidRequestError: what training would tell
# the user about his parameters is no fault of whoever asks the result.
_UNFIT = (
    RuntimeError,
    ValueError,
    KeyError,
    TypeError,
    OSError,
    SafetensorError,
    InvalidRequestError,
)


class ArtifactSlots:
    """The artifacts on one base. Only the engine's thread may call it, `activate` before each forward.

    Args:
        base_digest: the base's digest, which every artifact must name.
        probe_ids: tokens of a short text on which a new artifact has to prove itself.
    """

    def __init__(self, model: PreTrainedModel, *, base_digest: str, probe_ids: list[int]) -> None:
        self._model = model
        self._base_digest = base_digest
        self._probe_ids = probe_ids
        self._installed: dict[str, Installed] = {}
        self._active: str | None = None
        self.base_logits_V = probe(model, probe_ids, ())

    @property
    def installed(self) -> list[str]:
        """Digests of the artifacts on the base."""
        return list(self._installed)

    def install(self, digest: str, folder: Path) -> Prefix:
        """Lay an artifact on the base, switched off.

        Returns:
            What lies before every sequence of this artifact; empty for nothing.

        Raises:
            ArtifactCorruptError: when the files don't fit the base or each other.
            SelfCheckError: when the weights or the logits are not finite, the logits are those of the base,
                or the base's own are no longer what they were.
        """
        if digest in self._installed:
            return self._installed[digest].prefix()
        manifest = check_base(folder, self._base_digest)
        check_finite_weights(folder, manifest.digested)
        self.activate(None)
        try:
            name = "a" + digest.removeprefix("sha256:")
            self._installed[digest] = method_of_artifact(folder).install(self._model, folder, name)
            prefix = self._installed[digest].prefix()
            model = self.activate(digest)
            check_probe(probe(model, self._probe_ids, prefix), self.base_logits_V)
            canary = read_canary(folder)
            check_canary(canary, model.dtype, lambda token_ids: probe(model, token_ids, prefix))
            self._check_base_is_itself()
        except _UNFIT as error:
            self.remove(digest)
            raise ArtifactCorruptError("The artifact can't be loaded on its base model.") from error
        except BaseException:
            self.remove(digest)
            raise
        return prefix

    def remove(self, digest: str) -> None:
        """Take an artifact off the base; harmless when it is not there."""
        if digest == self._active:
            self.activate(None)
        installed = self._installed.pop(digest, None)
        if installed is not None:
            installed.remove()

    def activate(self, digest: str | None) -> PreTrainedModel:
        """Return the module that answers for an installed artifact, or for the bare base with None."""
        if digest != self._active:
            if self._active is not None:
                active, self._active = self._active, None
                self._installed[active].switch_off()
            if digest is not None:
                self._active = digest
                self._installed[digest].switch_on()
        return self._model

    def _check_base_is_itself(self) -> None:
        if not torch.equal(probe(self.activate(None), self._probe_ids, ()), self.base_logits_V):
            raise SelfCheckError("The artifact changes its base for others; it is not served.")


@torch.inference_mode()
def probe(model: PreTrainedModel, ids: list[int], prefix: Prefix) -> torch.Tensor:
    """Return what a model says after a short text.

    Args:
        ids: the text's tokens.

    Returns:
        logits_V, float32.
    """
    _, logits_1V = run_prompts(model, [ids], prefix)
    return logits_1V[0]
