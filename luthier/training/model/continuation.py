"""Continuation of a tuned model: the artifacts in the run directory, checked before they are used.

A run never trains on weights that it has not verified to be the parent's: digests, the base below and the
method are checked on the files, shapes where tensors are filled in, and the logits last of all.
"""

from pathlib import Path

import torch

from luthier.core.errors import ArtifactCorruptError, LuthierError, SelfCheckError, UnsuitableParentError
from luthier.core.specs import TunedModel
from luthier.methods import Attached, Method, method_of_artifact
from luthier.storage.manifests import verify_folder
from luthier.training.job import Job
from luthier.training.model.training_model import JobModel
from luthier.training.output.verification import bare_base, logits_agree


def check_parent(job: Job) -> None:
    """Check the files of the artifacts that a job continues.

    Raises:
        ArtifactCorruptError: when files do not match their manifest.
        UnsuitableParentError: when an artifact is another than the spec names, or of other weights.
        LuthierError: when the run directory has not what the spec names.
    """
    spec, inputs = job.spec, job.origin.inputs
    if spec.foundation is not None:
        _check(spec.foundation, inputs.foundation_path, base_digest=job.origin.base.digest)
    if spec.parent is not None and spec.takes_parents_weights:
        if spec.parent.method != spec.tuning["type"]:
            raise UnsuitableParentError(
                f"{spec.parent.name} was tuned by {spec.parent.method}; a job by {spec.tuning['type']} can't "
                "continue from it."
            )
        below = job.origin.base.digest if spec.foundation is None else spec.foundation.digest
        _check(spec.parent, inputs.parent_path, base_digest=below)


def ground_folder(job: Job, method: Method) -> Path:
    """Return the folder of the weights that a method is attached to.

    That is the base, the full model below, or, where every weight is tuned, the parent.
    """
    spec, inputs = job.spec, job.origin.inputs
    if spec.foundation is not None:
        return Path(_named(inputs.foundation_path))
    if spec.parent is not None and method.is_whole_model:
        return Path(_named(inputs.parent_path))
    return Path(inputs.base_path)


def take_parents_weights(job: Job, method: Method, attached: Attached) -> None:
    """Let a freshly attached model start as the parent, where the parent's weights are its method's own.

    Raises:
        UnsuitableParentError: when the parent's tensors are not those of this model.
    """
    if not job.spec.takes_parents_weights or method.is_whole_model:
        return
    try:
        method.take_weights(attached, Path(_named(job.origin.inputs.parent_path)))
    except ArtifactCorruptError as error:
        raise UnsuitableParentError(f"The job can't continue from its parent. {error.message}") from error


@torch.no_grad()
def verify_start(job: Job, model: JobModel) -> None:
    """Compare the model before its first step with the parent as its users load it.

    Raises:
        SelfCheckError: when the logits differ.
    """
    if not job.spec.takes_parents_weights:
        return
    method = model.method
    with model.evaluation_mode():
        found = model.logits(model.sample)
        model.parent_logits_BTV = found
        if method.is_whole_model:
            # Loaded from the parent's own files, in the base's place.
            return
        # Loading may draw random numbers; training draws its own as if it had not happened.
        with torch.random.fork_rng():
            loaded = method.load(bare_base(model), Path(_named(job.origin.inputs.parent_path)))
            expected = method.logits(loaded, model.sample.token_ids_BT)
    if not logits_agree(found, expected):
        raise SelfCheckError(
            "The model before its first step gives other logits than the one that it starts from. Nothing is "
            "published; please report it."
        )


def _check(model: TunedModel, path: str | None, *, base_digest: str) -> None:
    folder = Path(_named(path))
    manifest = verify_folder(folder)
    if manifest.digest != model.digest:
        raise UnsuitableParentError(
            f"{model.name} is no longer what it was when the job was made: its digest is {manifest.digest}, "
            f"and was {model.digest}. Make the job again."
        )
    if manifest.base_digest != base_digest:
        raise UnsuitableParentError(
            f"{model.name} was tuned on other weights ({manifest.base_digest}) than this job's "
            f"({base_digest})."
        )
    if method_of_artifact(folder).name != model.method:
        raise UnsuitableParentError(f"{model.name} was not made by the method {model.method}.")


def _named(path: str | None) -> str:
    if path is None:
        raise LuthierError("The run directory does not name the folder of the model that the job continues.")
    return path
