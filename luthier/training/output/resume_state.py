"""Save points: private resume state in sealed folders. safetensors and JSON only, never a pickle.

A save point at step k means that step k's update is done and nothing of step k + 1 has begun.
"""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from luthier.core.errors import ArtifactCorruptError
from luthier.storage.manifests import seal_folder, verify_folder
from luthier.training.loop.run_stats import Progress
from luthier.training.model.device import random_states, restore_random_states
from luthier.training.model.training_model import JobModel
from luthier.training.output.hardlink import pack_folder

_NUM_KEPT = 2
_WEIGHTS = "weights.safetensors"
_OPTIMIZER = "optimizer.safetensors"
_RNG = "rng.safetensors"
_STATE = "state.json"
_LOG = "training_log.jsonl"
_CHOSEN = "chosen"


@dataclass(frozen=True)
class SavePoint:
    """A folder that verified, and what it says."""

    folder: Path
    progress: Progress
    state: dict[str, Any]

    @property
    def chosen(self) -> Path:
        """Where it keeps the chosen checkpoint, if it does; `unpack_folder` takes it out."""
        return self.folder / _CHOSEN


class SavePoints:
    """The save points of one run, in `save_points` of the run directory.

    `fingerprint` names what is trained on what; a save point of another is never resumed.
    """

    def __init__(self, folder: Path, fingerprint: str) -> None:
        self._folder = folder
        self._fingerprint = fingerprint
        folder.mkdir(parents=True, exist_ok=True)

    def write(
        self,
        progress: Progress,
        model: JobModel,
        optimizer: torch.optim.Optimizer,
        chosen: Path | None = None,
    ) -> Path:
        """Make the state after a step durable and drop all but the newest two.

        `chosen` is the checkpoint that may become the result though training continued.
        """
        building = self._folder / f".step-{progress.step:06d}.building"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        names = model.named_parameters
        save_file({name: value.detach().cpu().contiguous() for name, value in names}, building / _WEIGHTS)
        save_file(_optimizer_tensors(names, optimizer), building / _OPTIMIZER)
        save_file(random_states(model.device), building / _RNG)
        state = {
            "fingerprint": self._fingerprint,
            "progress": progress.model_dump(mode="json", exclude={"log"}),
            **_rng_numbers(),
        }
        (building / _STATE).write_text(json.dumps(state))
        (building / _LOG).write_text(progress.log)
        if chosen is not None:
            pack_folder(chosen, building / _CHOSEN)
        final = self._folder / f"step-{progress.step:06d}"
        seal_folder(building, final)
        for old in self._newest_first()[_NUM_KEPT:]:
            shutil.rmtree(old)
        return final

    def find(self, warn: Callable[[str], None]) -> SavePoint | None:
        """Return the newest save point that verifies and is of this run; warn of those that are skipped."""
        for folder in self._newest_first():
            try:
                verify_folder(folder)
                state = json.loads((folder / _STATE).read_text())
                log = (folder / _LOG).read_text()
                progress = Progress.model_validate({**state["progress"], "log": log})
            except (ArtifactCorruptError, OSError, ValueError, KeyError):
                warn(f"The save point {folder.name} is damaged and was skipped for the one before.")
                continue
            if state["fingerprint"] != self._fingerprint:
                warn(f"The save point {folder.name} belongs to other settings or data and was skipped.")
                continue
            return SavePoint(folder, progress, state)
        return None

    @staticmethod
    def restore(save_point: SavePoint, model: JobModel, optimizer: torch.optim.Optimizer) -> None:
        """Put back a save point's tensors and random states.

        Raises:
            ArtifactCorruptError: when it holds other parameters than the model.
        """
        _restore_tensors(save_point.folder, model, optimizer)
        _restore_rng(save_point.folder, save_point.state, model.device)

    def _newest_first(self) -> list[Path]:
        folders = self._folder.glob("step-*")
        return sorted(folders, key=lambda folder: int(folder.name.removeprefix("step-")), reverse=True)


def _optimizer_tensors(
    names: list[tuple[str, torch.nn.Parameter]], optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    return {
        f"{name}|{key}": value.detach().cpu().contiguous()
        for name, parameter in names
        for key, value in optimizer.state[parameter].items()
    }


def _restore_tensors(folder: Path, model: JobModel, optimizer: torch.optim.Optimizer) -> None:
    names = model.named_parameters
    weights = load_file(folder / _WEIGHTS)
    if set(weights) != {name for name, _ in names}:
        raise ArtifactCorruptError(f"The save point {folder.name} holds other parameters than the model.")
    with torch.no_grad():
        for name, parameter in names:
            parameter.copy_(weights[name])
    states: dict[str, dict[str, torch.Tensor]] = {name: {} for name, _ in names}
    for key, value in load_file(folder / _OPTIMIZER).items():
        name, _, kind = key.rpartition("|")
        states[name][kind] = value
    for name, parameter in names:
        # AdamW counts its steps on the CPU, wherever the parameters are.
        optimizer.state[parameter] = {
            kind: value if kind == "step" else value.to(parameter.device)
            for kind, value in states[name].items()
        }


def _rng_numbers() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python_rng": random.getstate(),
        "numpy_rng": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
    }


def _restore_rng(folder: Path, state: dict[str, Any], device: str) -> None:
    restore_random_states(load_file(folder / _RNG), device)
    version, numbers, gauss = state["python_rng"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy_rng"]
    np.random.set_state((kind, np.asarray(keys, np.uint32), position, has_gauss, cached))
