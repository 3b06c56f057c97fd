"""The result: a sealed folder that its library loads as it is, with a card and the log beside the weights."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from luthier.core.events import Metrics
from luthier.core.specs import CANARY_NAME, BaseFacts, Canary, RunInputs, TrainingSpec
from luthier.storage.manifests import Manifest, seal_folder, verify_folder
from luthier.training.model.training_model import JobModel

LOG_NAME = "training_log.jsonl"
CARD_NAME = "README.md"


@dataclass(frozen=True)
class Origin:
    """Where an artifact comes from: the job, its spec and its base."""

    inputs: RunInputs
    spec: TrainingSpec
    base: BaseFacts


def write_artifact(
    folder: Path,
    model: JobModel,
    origin: Origin,
    *,
    step: int,
    metrics: Metrics,
    log: Path,
    canary: Canary,
) -> Manifest:
    """Write and seal an artifact folder in its final place, where an older one is replaced.

    Returns:
        The manifest; its digest covers weights, configuration and base digest.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    digested = model.method.save(model.attached, building)
    (building / CARD_NAME).write_text(_card(origin, model, step, metrics))
    (building / CANARY_NAME).write_text(canary.model_dump_json(exclude_defaults=True) + "\n")
    shutil.copyfile(log, building / LOG_NAME)
    return seal_folder(building, folder, digested=digested, base_digest=origin.spec.ground_digest)


def take_over_artifact(
    source: Path, folder: Path, model: JobModel, origin: Origin, *, step: int, metrics: Metrics
) -> Manifest:
    """Move an artifact that an earlier attempt may have written, with a card that names this one's model.

    The files of `source` may be links to other places; the folder is gone afterwards. The digest stays.

    Raises:
        ArtifactCorruptError: when the source is not as it was written.
    """
    manifest = verify_folder(source)
    building = folder.with_name(f".{folder.name}.building")
    shutil.rmtree(building, ignore_errors=True)
    source.rename(building)
    # Not written in place: other folders may hold the same file.
    (building / CARD_NAME).unlink()
    (building / CARD_NAME).write_text(_card(origin, model, step, metrics))
    return seal_folder(
        building,
        folder,
        digested=manifest.digested,
        base_digest=manifest.base_digest,
        known={name: manifest.files[name] for name in manifest.digested},
    )


def _card(origin: Origin, model: JobModel, step: int, metrics: Metrics) -> str:
    """Return a model card: a YAML header that hubs read, then what a person wants to know."""
    spec, base = origin.spec, origin.base
    header = ModelCardData(
        base_model=base.id,
        library_name=model.method.library_name or None,
        license=base.licence,
        pipeline_tag="text-generation",
        tags=["luthier", model.method.name],
    )
    lines = ["---", header.to_yaml(), "---", ""]
    lines += [f"# {_code(origin.inputs.model_name)}", ""]
    lines += [
        f"{model.method.title}, tuned from {_code(base.id)} by job {_code(origin.inputs.job_id)}.",
        "",
    ]
    if spec.foundation is not None:
        lines += [
            f"It was trained on the full model {_code(spec.foundation.name)}, tuned from {_code(base.id)}, "
            "and not on that base itself: load it on that model's files.",
            "",
        ]
    facts: dict[str, Any] = {
        "base digest": base.digest,
        **_lineage(spec),
        "steps": step,
        "trained parameters": model.attached.num_trained_parameters,
        **{f"tuning.{key}": value for key, value in spec.tuning.items() if key != "type"},
        **spec.hyperparameters.model_dump(),
        # What a user asks the model is no fact about it.
        **spec.training.model_dump(exclude={"sample_prompts"}),
        "seed": spec.seed,
        **metrics.model_dump(exclude_none=True),
    }
    lines += ["| what | value |", "|---|---|"]
    lines += [f"| {key} | {_code(value)} |" for key, value in facts.items()]
    lines += ["", "## Loading", "", model.method.loading, ""]
    return "\n".join(lines)


def _lineage(spec: TrainingSpec) -> dict[str, str]:
    """Return the tuned models that an artifact was made from, each with its digest."""
    named = {"continued from": spec.parent, "trained on": spec.foundation}
    return {what: f"{model.name} {model.digest}" for what, model in named.items() if model is not None}


def _code(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    cleaned = "".join(c if c.isprintable() and c not in "`|" else " " for c in text)
    return f"`{cleaned}`"


class TrainingLog:
    """The run's history, one JSON object a line; it begins as what a save point holds."""

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        path.write_text(text)

    def append(self, **facts: Any) -> None:
        with self.path.open("a") as stream:
            stream.write(json.dumps(facts) + "\n")

    def read(self) -> str:
        return self.path.read_text()
