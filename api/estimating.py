"""Estimating a job: its rows are counted in a thread, in bounded time, with no session open."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

from api.deps import Parts
from api.turns import get_base_here, run_apart, turn
from db.tables import File
from luthier.bases.catalogue import base_folder
from luthier.core.shapes import read_shape
from luthier.core.specs import BaseFacts, TrainingSpec
from luthier.data.count import RowCounts, count_rows
from luthier.data.objectives import Purpose
from luthier.data.prompts import check_sample_prompts
from luthier.methods import room_in_context, row_limit
from services import calibrations, integrations, jobs
from services.estimates import Estimate, estimate
from services.jobs import NewJob
from services.scope import Scope

MAX_ROWS = 4000
_MAX_SECONDS = 10.0


@dataclass(frozen=True)
class _Input:
    id: str
    storage_key: str
    sha256: str

    @classmethod
    def of(cls, file: File) -> "_Input":
        return cls(file.id, file.storage_key, file.sha256)


async def estimate_apart(parts: Parts, scope: Scope, request: NewJob) -> Estimate:
    """Tell what a job would take; nothing is stored. Few at a time: others wait without a thread.

    Raises:
        LuthierError: what creating the job would raise; and when the base is not on this machine.
        UnavailableError: when others are estimated for longer than one can wait.
    """
    async with turn(parts.estimates, told="Other estimates are being made; try again."):
        return await run_apart(lambda: _estimate(parts, scope, request))


def _estimate(parts: Parts, scope: Scope, request: NewJob) -> Estimate:
    with parts.database.transaction() as session:
        request = integrations.checked(session, parts.settings, request)
        checked = jobs.check(session, scope, parts.catalogue, request)
        training = _Input.of(checked.training_file)
        validation = None if checked.validation_file is None else _Input.of(checked.validation_file)
        memory_bytes = calibrations.find_worker_memory(session)
    spec = checked.spec
    base = get_base_here(parts, spec.base_id, param="model")
    with parts.database.transaction() as session:
        measured, reason = calibrations.find_measured(session, base, spec.training.precision)
    if measured is not None and measured.constants.device != "cpu":
        # Of a GPU's memory prepare knows nothing either.
        memory_bytes = None
    folder = base_folder(parts.settings.bases_dir, base.id)
    check_sample_prompts(spec.training.sample_prompts, folder, max_tokens=room_in_context(spec, base))
    return estimate(
        spec,
        base=base,
        shape=read_shape(folder),
        base_folder=folder,
        training=_count(parts, training, "training", spec, folder, base),
        validation=(
            None if validation is None else _count(parts, validation, "validation", spec, folder, base)
        ),
        measured=measured,
        reason=reason,
        memory_bytes=memory_bytes,
    )


def _count(
    parts: Parts, file: _Input, purpose: Purpose, spec: TrainingSpec, folder: Path, base: BaseFacts
) -> RowCounts:
    with tempfile.TemporaryDirectory(prefix="luthier-estimate-") as scratch:
        path = Path(scratch) / "rows.jsonl"
        parts.storage.fetch_file(file.storage_key, path, sha256=file.sha256)
        return count_rows(
            path,
            folder,
            max_length=row_limit(spec, base),
            too_long=spec.training.too_long,
            max_rows=MAX_ROWS,
            max_seconds=_MAX_SECONDS,
            purpose=purpose,
            wants_pairs=spec.dpo is not None,
        )
