"""Every failure as an answer: the one shape, a status that the SDKs take as it is meant."""

import json
import pkgutil
from importlib import import_module

import pytest

import services
from api.errors import to_response
from luthier.core import errors
from luthier.core.errors import LuthierError

# Both SDKs repeat these by themselves, unless an answer says that it is permanent.
_REPEATED = {408, 409, 429}
# Python's SDK gives up above 120 s, Node's takes its own pause above 60 s.
_LONGEST_WAIT_SECONDS = 60


def _all_errors() -> list[type[LuthierError]]:
    """Return every error class of the library and the service."""
    for found in pkgutil.walk_packages(services.__path__, "services."):
        import_module(found.name)
    waiting, classes = [LuthierError], []
    while waiting:
        cls = waiting.pop()
        classes.append(cls)
        waiting += cls.__subclasses__()
    return classes


def test_every_class_of_the_list_is_looked_at():
    named = {cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, LuthierError)}
    assert named <= set(_all_errors())
    assert len(named) > 25


@pytest.mark.parametrize("cls", _all_errors(), ids=lambda cls: cls.__name__)
def test_no_sdk_repeats_a_permanent_refusal_or_waits_long_for_a_passing_one(cls):
    try:
        error = cls("what is wrong", param="where")
    except TypeError:
        pytest.skip("an answer of a service, seen by its clients")
    answer = to_response(error)
    body = json.loads(bytes(answer.body))["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert isinstance(body["code"], str)
    assert answer.status_code != 422
    is_repeated = answer.status_code in _REPEATED or answer.status_code >= 500
    # A full disk passes for a job, which waits; an upload that is sent again only loads the service.
    if error.retryable and answer.status_code != 507:
        assert is_repeated, "the SDKs would not repeat it"
        assert "x-should-retry" not in answer.headers
        assert 0 < int(answer.headers["retry-after"]) <= _LONGEST_WAIT_SECONDS
    elif is_repeated:
        assert answer.headers["x-should-retry"] == "false"
