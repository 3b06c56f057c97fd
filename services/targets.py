"""What requests for answers mean: whose they are, and what runs for them; many of them by two statements."""

from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy.orm import Session

from luthier.bases.catalogue import Catalogue
from luthier.core.errors import InvalidValueError, LuthierError
from luthier.core.inference import ModelTarget
from services import keys, models
from services.names import Asked, unknown_model
from services.scope import Scope

# No model has a longer one; others' requests would wait for the statement that holds it.
_MAX_NAME_CHARACTERS = 1024


@dataclass
class Call:
    """A request's key in plain text, and the public name that it asks for, or what is wrong with that.

    `caller` is set once the key was looked up; None where it opens nothing.
    """

    key: str
    name: str | LuthierError
    caller: Scope | None = None


def find_targets(
    session: Session, catalogue: Catalogue, calls: Sequence[Call]
) -> list[ModelTarget | LuthierError]:
    """Turn the names of requests into what the inference server runs for them.

    Args:
        session: the session; what is read need not be of one moment.

    Returns:
        What runs for each, or why nothing does.
    """
    scopes = keys.authenticate_all(session, {call.key for call in calls})
    for call in calls:
        call.caller = scopes[call.key]
    asked = [_to_asked(call.caller, call.name) for call in calls]
    names = dict.fromkeys(one for one in asked if isinstance(one, Asked))
    targets = models.resolve_all(session, catalogue, [*names]) if names else {}
    return [targets[one] if isinstance(one, Asked) else one for one in asked]


def _to_asked(scope: Scope | None, name: str | LuthierError) -> Asked | LuthierError:
    if scope is None:
        # Whoever has no key hears of nothing else.
        return keys.unknown_key()
    if isinstance(name, LuthierError):
        return name
    # First: an error that repeats such a name could not be sent.
    if not _is_storable(name):
        return InvalidValueError("A model's name has no NUL and no half of a surrogate pair.", param="model")
    if len(name) > _MAX_NAME_CHARACTERS:
        return unknown_model(name)
    return Asked(scope.project_id, name)


def _is_storable(name: str) -> bool:
    """Whether a statement may hold a name; a single one that may not would fail those of all requests."""
    try:
        return b"\x00" not in name.encode()
    except UnicodeEncodeError:
        return False
