"""The speed of this machine's device: measured once by a short process, kept in the worker's row.

Until a job has finished on a base, estimates of seconds rest on it.
"""

import subprocess

import structlog
from pydantic import ValidationError

from luthier.core.cost_model import DeviceSpeed
from luthier.core.errors import LuthierError
from luthier.core.runtime import tied_python
from services.capacity import speeds
from worker.context import WorkerContext
from worker.training_process.child import child_environment

_log = structlog.get_logger()
_MAX_SECONDS = 120.0


def measure_once(context: WorkerContext) -> None:
    """Put the device's speed among the worker's facts: as a worker of this machine measured it, or anew."""
    try:
        speed = known_speed(context) or _measure(context)
    except (LuthierError, OSError, subprocess.SubprocessError, ValidationError) as error:
        # Jobs need no estimates, and a job that finishes says more.
        _log.warning("speed of the device not measured", reason=type(error).__name__)
        return
    context.facts |= {"speed": speed.model_dump(), "device_setting": context.settings.device}


def known_speed(context: WorkerContext) -> DeviceSpeed | None:
    """Return what a worker of this machine that is set up like this one measured; None where none has."""
    with context.database.transaction() as session:
        return speeds.find_speed(
            session,
            hostname=context.hostname,
            num_threads=context.num_threads,
            device_setting=context.settings.device,
        )


def _measure(context: WorkerContext) -> DeviceSpeed:
    asked = (context.settings.device, str(context.num_threads))
    done = subprocess.run(
        tied_python("-m", "luthier.training", "--measure-speed", *asked),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=child_environment(context.num_threads),
        timeout=_MAX_SECONDS,
        check=True,
    )
    return DeviceSpeed.model_validate_json(done.stdout)
