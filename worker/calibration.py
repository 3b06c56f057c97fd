"""Calibrations: an idle worker lets a training process measure what training costs on each base it has.

The probe is a child like any other: own group, no secret, dead with its parent. It gives way at once when a
job waits or the worker stops.
"""

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from functools import cache
from importlib import metadata
from pathlib import Path

import structlog
from pydantic import ValidationError

import luthier
from db.session import Database
from luthier.bases.catalogue import base_folder, find_base_facts
from luthier.core.errors import LuthierError
from luthier.core.estimates import Calibration
from luthier.core.specs import BaseFacts, Precision
from luthier.methods import discover
from services import calibrations, leases
from worker.child import child_environment
from worker.context import WorkerContext

_log = structlog.get_logger()

_LOOK_SECONDS = 0.2
# Until the spares of a worker that has just started have done their imports, beside which all looks slow.
_SETTLING_SECONDS = 15.0
_MAX_SECONDS = 300.0
_RETRY_SECONDS = 3600.0
_MAX_TOLD = 300
_MEASURED_CODE = ("methods", "modeling", "training")
_PRECISIONS: tuple[Precision, ...] = ("auto", "float32")


def calibrate_for_ever(context: WorkerContext) -> None:
    """Measure at every sweep what is not measured yet; runs in a thread of the worker's main process.

    The thread lives as long as the process, for the kernel ties the child's life to it.
    """
    if context.spare is not None:
        context.stopping.wait(_SETTLING_SECONDS)
    while not context.stopping.wait(context.settings.sweep_seconds):
        try:
            calibrate_when_idle(context)
        except (LuthierError, OSError) as error:
            _log.warning("measurement put off", reason=str(error))
        except Exception:
            # Jobs need no estimates: the worker goes on, and measures no more until it is started again.
            _log.exception("measuring has broken")
            raise


def calibrate_when_idle(context: WorkerContext) -> bool:
    """Measure one base that this machine has not measured with this code, if no job waits or runs.

    Returns:
        Whether something was measured and kept; False when there is nothing to do, or a job came first.
    """
    if _is_wanted(context):
        return False
    for base_id in context.catalogue.bases:
        base = find_base_facts(context.settings.bases_dir, base_id)
        if base is None:
            continue
        for precision in _PRECISIONS:
            if not _is_known(context, base, precision):
                return _calibrate(context, base, precision)
    return False


@cache
def code_version() -> str:
    """Name the code that a calibration measured: ours that trains, and the libraries below it."""
    found = hashlib.sha256()
    root = Path(luthier.__file__).parent
    for folder in _MEASURED_CODE:
        for path in sorted((root / folder).rglob("*.py")):
            found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    for name in ("torch", "transformers", "peft", "numba"):
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            # Without numba the kernels are torch's own operators.
            version = "absent"
        found.update(f"{name} {version}".encode())
    return found.hexdigest()[:16]


def _is_known(context: WorkerContext, base: BaseFacts, precision: Precision) -> bool:
    with context.database.transaction() as session:
        return calibrations.is_recorded(
            session,
            hostname=context.hostname,
            base=base,
            precision=precision,
            num_threads=context.num_threads,
            code_version=code_version(),
            retry_seconds=_RETRY_SECONDS,
        )


def _calibrate(context: WorkerContext, base: BaseFacts, precision: Precision) -> bool:
    constants, error = _probe(context, base, precision)
    if constants is not None and constants.is_cold:
        # Kernels were compiled on the way, which no later run does.
        constants, error = _probe(context, base, precision)
    if constants is None and error is None:
        return False
    _record(context, base, precision, constants, error)
    while constants is not None and (missing := _num_missing(constants)):
        # One probe is short; a further one goes on with the variants that it had no time for.
        more, _ = _probe(context, base, precision, constants.variants)
        if more is None:
            break
        constants = constants.model_copy(update={"variants": more.variants | constants.variants})
        if _num_missing(constants) == missing:
            break
        _record(context, base, precision, constants, None)
    return True


def _num_missing(constants: Calibration) -> int:
    probes = {name for method in discover().values() for name in method.probes}
    return len(probes - set(constants.variants))


def _record(
    context: WorkerContext,
    base: BaseFacts,
    precision: Precision,
    constants: Calibration | None,
    error: str | None,
) -> None:
    with context.database.transaction() as session:
        calibrations.record(
            session,
            hostname=context.hostname,
            worker_id=context.worker_id,
            base=base,
            precision=precision,
            num_threads=context.num_threads,
            code_version=code_version(),
            constants=constants,
            error=error,
        )
    _log.info("base measured", base=base.id, precision=precision, error=error)


def _probe(
    context: WorkerContext, base: BaseFacts, precision: Precision, measured: Collection[str] = ()
) -> tuple[Calibration | None, str | None]:
    """Run the probe; return what it measured or why it failed, neither when it gave way to a job."""
    settings = context.settings
    folder = base_folder(settings.bases_dir.absolute(), base.id)
    asked = [str(folder), settings.device, precision, str(context.num_threads), *measured]
    command = [sys.executable, "-P", "-m", "luthier.training", "--calibrate", *asked]
    with tempfile.TemporaryFile() as answer, tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "luthier.core.process", str(os.getpid()), *command],
            stdin=subprocess.DEVNULL,
            stdout=answer,
            stderr=log,
            env=child_environment(context.num_threads),
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + _MAX_SECONDS
            while process.poll() is None:
                if time.monotonic() > deadline:
                    return None, f"it took more than {_MAX_SECONDS:.0f} s"
                if _is_wanted(context):
                    return None, None
                context.stopping.wait(_LOOK_SECONDS)
        finally:
            _end(process)
        if context.stopping.is_set():
            return None, None
        answer.seek(0)
        log.seek(0)
        if process.returncode != 0:
            return None, _last_line(log.read(), process.returncode)
        try:
            return Calibration.model_validate_json(answer.read()), None
        except ValidationError:
            return None, "its answer is no calibration"


def _is_wanted(context: WorkerContext) -> bool:
    """Whether a job waits or runs here, or the worker is to stop."""
    return context.stopping.is_set() or _has_work(context.database, context.worker_id)


def _has_work(database: Database, worker_id: str) -> bool:
    with database.transaction() as session:
        return leases.is_work_waiting(session) or leases.is_at_work(session, worker_id)


def _end(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(log: bytes, exit_code: int) -> str:
    """Return how a child ended; its last line names the error, and holds nothing of anybody's rows."""
    lines = log.decode(errors="replace").strip().splitlines()
    told = lines[-1][:_MAX_TOLD] if lines else "no word"
    return f"exit code {exit_code}, {told}"
