"""Artifacts in a folder that vLLM reads, and which of them it can serve. Blocks; call it in a thread.

The folder may be shared by API processes and vLLM servers. Copies are removed after a day without use:
vLLM may read one again long after it was loaded.
"""

import json
import time
from pathlib import Path
from typing import NamedTuple

from luthier.bases.catalogue import find_base_facts
from luthier.core.errors import ArtifactCorruptError, InvalidRequestError, UnsupportedValueError
from luthier.core.inference import ModelTarget
from luthier.core.settings import Settings
from luthier.core.specs import CANARY_NAME, Canary
from luthier.inference.models.artifact_cache import CachedArtifact, drop_unused, fetch_artifact, mark_used
from luthier.methods import method_of_artifact
from luthier.methods._peft import CONFIG_NAME
from luthier.serving._vllm_wire import served_name
from luthier.storage.manifests import read_manifest
from luthier.storage.store import Storage

_KEPT_SECONDS = 24 * 3600.0
_WHICH_CAN = "An operator serves it by the backend engine (LUTHIER_INFERENCE_BACKEND)."


class Adapter(NamedTuple):
    """An adapter that vLLM can load: its folder as vLLM sees it, and what training recorded of it."""

    path: str
    canary: Canary | None


class Artifacts:
    """The folder of copies.

    Args:
        settings: where artifacts are published, the folder of copies, and how vLLM names that folder.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = settings.vllm_adapters_dir
        self._storage: Storage | None = None

    def prepare(self, target: ModelTarget) -> Adapter:
        """Fetch a model's artifact into the folder, verify it, and check that vLLM can serve it.

        Raises:
            UnsupportedValueError: when vLLM can't serve its method.
            InvalidRequestError: when it is a whole model, which needs a server of its own.
            ArtifactCorruptError: when its bytes are missing or damaged, or it is of another base.
        """
        if target.artifact is None or target.digest is None:
            raise ValueError("a bare base has no artifact")
        if self._storage is None:
            self._storage = Storage.open(self._settings.storage_url)
        # Before gigabytes are fetched for nothing.
        if CONFIG_NAME not in self._storage.read_manifest(target.artifact).files:
            raise _whole_model(target.model, target.digest)
        copy = fetch_artifact(self._storage, target.artifact, target.digest, self._folder)
        mark_used(copy.folder)
        self._drop_old()
        _check_method(copy.folder)
        self._check_base(copy, target)
        seen = self._settings.vllm_adapters_path or str(self._folder.absolute())
        return Adapter(f"{seen.rstrip('/')}/{copy.folder.name}", _read_canary(copy.folder))

    def base_digest(self, base_id: str) -> str | None:
        """Return the digest of a base, None where this machine does not have it."""
        facts = find_base_facts(self._settings.bases_dir, base_id)
        return None if facts is None else facts.digest

    def _check_base(self, copy: CachedArtifact, target: ModelTarget) -> None:
        beneath = target.full_model_digest or self.base_digest(target.base_id)
        if beneath is not None and read_manifest(copy.folder).base_digest != beneath:
            raise ArtifactCorruptError("The artifact was trained on another version of the base model.")

    def _drop_old(self) -> None:
        now = time.time()
        copies = [path for path in self._folder.iterdir() if not path.name.startswith(".")]
        young = [path for path in copies if now - path.stat().st_mtime < _KEPT_SECONDS]
        in_use = {f"sha256:{path.name}" for path in young}
        drop_unused(self._folder, max_kept=self._settings.max_cached_artifacts, in_use=in_use)


def _check_method(folder: Path) -> None:
    method = method_of_artifact(folder).name
    config = json.loads((folder / CONFIG_NAME).read_bytes())
    if method != "lora":
        raise UnsupportedValueError(
            f"This model was tuned by {method}, which vLLM can't serve. {_WHICH_CAN}", param="model"
        )
    if config.get("use_dora"):
        raise UnsupportedValueError(
            f"This model was tuned by lora with use_dora, which vLLM can't serve. {_WHICH_CAN}", param="model"
        )


def _read_canary(folder: Path) -> Canary | None:
    path = folder / CANARY_NAME
    try:
        return Canary.model_validate_json(path.read_bytes()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise ArtifactCorruptError("What training recorded of the model can't be read.") from error


def _whole_model(model: str, digest: str) -> InvalidRequestError:
    return UnsupportedValueError(
        f"{model[:80]} is fully tuned, which takes a vLLM server of its own. An operator downloads it "
        f"and runs `vllm serve FOLDER --served-model-name {served_name(digest)}`, its URL added to "
        "LUTHIER_INFERENCE_URL; or uses the backend engine (LUTHIER_INFERENCE_BACKEND).",
        param="model",
    )
