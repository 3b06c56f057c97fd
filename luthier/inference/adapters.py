"""Artifacts loaded as named PEFT adapters on their base, probed first.

Whatever PEFT can load is served by the same lines; nothing here asks which method an artifact is.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import torch
from peft import PeftConfig, PeftModelForCausalLM, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from luthier.core.errors import ArtifactCorruptError, SelfCheckError
from luthier.storage.manifests import verify_folder

WEIGHTS_NAME = "adapter_model.safetensors"
MAX_LOADED_ADAPTERS = 16


class Artifact(Protocol):
    """What loading needs to know of a served model."""

    @property
    def digest(self) -> str | None:
        """The artifact's digest; None for the bare base."""

    @property
    def folder(self) -> Path | None:
        """The verified local folder; None for the bare base."""


class AdapterSlots:
    """The adapters loaded on one base. Only the engine's thread may call it, `activate` before each forward.

    Args:
        model: the base's weights, in evaluation mode.
        base_digest: the base's digest, which every artifact must name.
        probe_ids: tokens of a short text on which a new adapter has to prove itself.
        max_loaded: adapters kept; the one unused for longest leaves first.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        base_digest: str,
        probe_ids: list[int],
        max_loaded: int = MAX_LOADED_ADAPTERS,
    ) -> None:
        self._model = model
        self._base_digest = base_digest
        self._probe_ids = probe_ids
        self._max_loaded = max_loaded
        self._peft: PeftModelForCausalLM | None = None
        self._loaded: OrderedDict[str, None] = OrderedDict()
        self._active: str | None = None

    @property
    def loaded(self) -> list[str]:
        """Digests of the loaded adapters, the one unused for longest first."""
        return list(self._loaded)

    def ensure(self, artifact: Artifact, in_use: set[str]) -> None:
        """Load an artifact's adapter unless it is loaded already.

        Args:
            artifact: the artifact; nothing is done for a bare base.
            in_use: digests that must not leave to make room.

        Raises:
            ArtifactCorruptError: when the files don't fit the base or each other.
            SelfCheckError: when the adapter's logits are not finite, or are those of the base.
        """
        digest, folder = artifact.digest, artifact.folder
        if digest is None or folder is None:
            return
        if digest in self._loaded:
            self._loaded.move_to_end(digest)
            return
        self._load(digest, folder)
        self._loaded[digest] = None
        self._evict(in_use | {digest})

    def activate(self, digest: str | None) -> torch.nn.Module:
        """Return the module that answers for a loaded adapter, or for the bare base with None."""
        if self._peft is None:
            return self._model
        if digest != self._active:
            self._switch(digest)
        return self._model if digest is None else self._peft

    def _switch(self, digest: str | None) -> None:
        assert self._peft is not None
        tuner = self._peft.base_model
        if digest is None:
            if isinstance(tuner, BaseTuner):
                tuner.disable_adapter_layers()
        else:
            if isinstance(tuner, BaseTuner):
                tuner.enable_adapter_layers()
            self._peft.set_adapter(_adapter_name(digest), inference_mode=True)
        self._active = digest

    def _load(self, digest: str, folder: Path) -> None:
        if verify_base_digest(folder) != self._base_digest:
            raise ArtifactCorruptError("The artifact was trained on another version of the base model.")
        name = _adapter_name(digest)
        base_logits_V = self._probe(None)
        try:
            self._attach(name, folder)
            self._peft_module().eval()
            # Attaching leaves PEFT's switches as it likes; set them anew.
            self._switch(digest)
            self._check_weights(name, folder)
            self._check_probe(digest, base_logits_V)
        except (ArtifactCorruptError, SelfCheckError):
            self._detach(name)
            raise
        except (RuntimeError, ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
            self._detach(name)
            raise ArtifactCorruptError("The artifact can't be loaded on its base model.") from error

    def _attach(self, name: str, folder: Path) -> None:
        config = PeftConfig.from_pretrained(str(folder))
        config.inference_mode = True
        if self._peft is None:
            self._peft = PeftModelForCausalLM(self._model, config, adapter_name=name)
        self._peft.load_adapter(
            str(folder), adapter_name=name, is_trainable=False, torch_device=str(self._model.device)
        )

    def _detach(self, name: str) -> None:
        if self._peft is None:
            return
        if name in self._peft.peft_config:
            self._peft.delete_adapter(name)
        self._switch(None)

    def _check_weights(self, name: str, folder: Path) -> None:
        # The embedding question would make PEFT look for the base on a hub.
        state = get_peft_model_state_dict(self._peft_module(), adapter_name=name, save_embedding_layers=False)
        with safe_open(folder / WEIGHTS_NAME, framework="pt") as stored:
            if set(stored.keys()) != set(state):
                raise ArtifactCorruptError("The artifact's weights do not match the modules of its base.")
        # Not left to the probe: the attention kernel can turn a NaN query into finite output.
        if not all(bool(torch.isfinite(tensor).all()) for tensor in state.values()):
            raise SelfCheckError("The model's weights are not finite; it is not served.")

    def _check_probe(self, digest: str, base_logits_V: torch.Tensor) -> None:
        logits_V = self._probe(digest)
        if not bool(torch.isfinite(logits_V).all()):
            raise SelfCheckError("The model's logits are not finite; it is not served.")
        if torch.equal(logits_V, base_logits_V):
            raise SelfCheckError("The model's adapter changes nothing about its base; it is not served.")

    def _probe(self, digest: str | None) -> torch.Tensor:
        module = self.activate(digest)
        ids_1T = torch.tensor([self._probe_ids], device=self._model.device)
        with torch.inference_mode():
            return module(input_ids=ids_1T, use_cache=False).logits[0, -1].float()

    def _evict(self, in_use: set[str]) -> None:
        for digest in list(self._loaded):
            if len(self._loaded) <= self._max_loaded:
                return
            if digest not in in_use:
                del self._loaded[digest]
                self._detach(_adapter_name(digest))

    def _peft_module(self) -> PeftModelForCausalLM:
        assert self._peft is not None
        return self._peft


def verify_base_digest(folder: Path) -> str | None:
    """Return the base digest that a folder's manifest names."""
    return verify_folder(folder).base_digest


def _adapter_name(digest: str) -> str:
    return "a" + digest.removeprefix("sha256:")
