"""The estimate of a job: rows are counted in a thread, in bounded time and memory, with no session open."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from api.deps import AppState, get_local_base
from db.tables import File
from luthier.bases.catalogue import base_folder
from luthier.core.shapes import BaseShape, read_shape
from luthier.core.specs import BaseFacts, TrainingSpec
from luthier.data.prepare.objectives import Purpose
from luthier.data.prepare.row_counts import SAMPLE_BYTES, RowCounts, count_rows
from luthier.data.prepare.sample_prompts import check_sample_prompts
from luthier.methods._tuning import room_in_context, row_limit
from services.accounts.auth import Principal
from services.capacity import speeds
from services.capacity.estimates import Estimate, Grounds, estimate
from services.jobs import jobs
from services.jobs.jobs import NewJob

MAX_ROWS = 4000
_MAX_SECONDS = 10.0


async def estimate_in_thread(state: AppState, principal: Principal, request: NewJob) -> Estimate:
    """Estimate what a job would take; nothing is stored.

    Raises:
        LuthierError: what creating the job would raise; and when the base is not on this machine.
        TooManyRequestsError: when another estimate of the project is being made.
        UnavailableError: when estimates of other projects take too long.
    """
    work = partial(_estimate, state, principal, request)
    return await state.estimates.run_in_thread(principal.project_id, work)


def _estimate(state: AppState, principal: Principal, request: NewJob) -> Estimate:
    with state.database.transaction() as session:
        request = jobs.with_checked_integrations(session, state.settings, request)
        checked = jobs.check(session, principal, state.catalogue, state.settings, request)
        memory_bytes = speeds.find_worker_memory(session)
    spec, validation = checked.spec, checked.validation_file
    base = get_local_base(state, spec.base_id, param="model")
    folder = base_folder(state.settings.bases_dir, base.id)
    shape = read_shape(folder)
    grounds = _find_grounds(state, spec, base, shape)
    if grounds is not None and grounds.device.device != "cpu":
        # Prepare does not know the memory of a GPU either.
        memory_bytes = None
    check_sample_prompts(spec.training.sample_prompts, folder, max_tokens=room_in_context(spec, base))
    return estimate(
        spec,
        base=base,
        shape=shape,
        base_folder=folder,
        training=_count(state, checked.training_file, "training", spec, folder, base),
        validation=_count(state, validation, "validation", spec, folder, base) if validation else None,
        grounds=grounds,
        memory_bytes=memory_bytes,
    )


def _find_grounds(state: AppState, spec: TrainingSpec, base: BaseFacts, shape: BaseShape) -> Grounds | None:
    with state.database.transaction() as session:
        finished, device = speeds.list_finished(session, base, shape, spec.training.precision)
        device = device or speeds.find_speed(session)
    return None if device is None else Grounds(device, finished)


def _count(
    state: AppState, file: File, purpose: Purpose, spec: TrainingSpec, folder: Path, base: BaseFacts
) -> RowCounts:
    is_whole = state.storage.local_root is not None or file.num_bytes <= SAMPLE_BYTES
    with _local_rows(state, file, is_whole=is_whole) as path:
        return count_rows(
            path,
            folder,
            num_rows=file.num_rows,
            is_whole=is_whole,
            max_length=row_limit(spec, base),
            too_long=spec.training.too_long,
            max_rows=MAX_ROWS,
            max_seconds=_MAX_SECONDS,
            purpose=purpose,
            wants_pairs=spec.dpo is not None,
        )


@contextmanager
def _local_rows(state: AppState, file: File, *, is_whole: bool) -> Iterator[Path]:
    """Yield a local file with the rows: the stored file itself, or a copy of its beginning."""
    if is_whole:
        with state.storage.local_file(file.storage_key) as path:
            yield path
        return
    with tempfile.NamedTemporaryFile(prefix="luthier-estimate-") as beginning:
        beginning.write(state.storage.read_start(file.storage_key, SAMPLE_BYTES))
        beginning.flush()
        yield Path(beginning.name)
