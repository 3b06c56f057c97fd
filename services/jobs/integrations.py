"""A job's integrations: whether what it asks to be followed by is there."""

from dataclasses import replace
from datetime import timedelta

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from db.tables import Worker
from luthier.core.errors import UnsupportedValueError
from luthier.core.settings import Settings
from luthier.trackers import check_integrations, discover
from services.jobs.jobs import NewJob

# A worker that was not heard of for so long is not counted on.
_ALIVE = timedelta(minutes=1)


def checked(session: Session, settings: Settings, request: NewJob) -> NewJob:
    """Return the request with its integrations checked, or refuse it.

    Raises:
        InvalidRequestError: when one is malformed, not set up, or no worker at hand has its package; the
            message names what the operator must do.
    """
    if not request.integrations:
        return request
    found = check_integrations(request.integrations, settings)
    for index, integration in enumerate(found):
        _check_installed(session, integration["type"], f"integrations.{index}.type")
    return replace(request, integrations=found)


def _check_installed(session: Session, name: str, param: str) -> None:
    if discover()[name].package is None:
        return
    facts = session.scalars(select(Worker.facts).where(Worker.heartbeat_at > func.now() - _ALIVE)).all()
    told = [found["trackers"] for found in facts if "trackers" in found]
    # Where no worker lives, nothing is known; the one that comes may have it.
    if told and not any(name in trackers for trackers in told):
        raise UnsupportedValueError(
            f"{param}: no worker has the package of {name}. Operator: pip install 'luthier[{name}]' there.",
            param=param,
        )
