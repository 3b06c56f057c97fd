"""What a vLLM server tells of itself, read: the models that it answers for, and how busy it is.

A model's card has a parent where it is an adapter, and none where it is the server's own base.
"""

import json
import re
from typing import NamedTuple

from luthier.core.errors import UnavailableError
from luthier.serving.base import Health

_OUR_NAME = re.compile(r"luthier-([0-9a-f]{64})")
_GAUGE = re.compile(rb"^vllm:num_requests_(running|waiting)(?:\{[^}]*\})? ([0-9.e+]+)$", re.MULTILINE)


class Served(NamedTuple):
    """The names that a server answers to: its base's or whole model's own, and those of adapters of ours."""

    bases: frozenset[str]
    adapters: frozenset[str]


def served_name(digest: str) -> str:
    """Return the name that an artifact has in vLLM, of an adapter and of a whole model alike."""
    return f"luthier-{digest.removeprefix('sha256:')}"


def read_models(content: bytes) -> Served:
    """Read what GET /v1/models answers.

    Raises:
        UnavailableError: when it is no list of models.
    """
    try:
        cards = [(str(card["id"]), card.get("parent")) for card in json.loads(content)["data"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnavailableError("What answers in vLLM's place does not list its models.") from error
    adapters = {name for name, parent in cards if parent is not None and _OUR_NAME.fullmatch(name)}
    return Served(frozenset(name for name, parent in cards if parent is None), frozenset(adapters))


def read_health(served: Served, metrics: bytes) -> Health:
    """Put together how a server is.

    Args:
        metrics: what GET /metrics answers; what is not there counts as none.

    Returns:
        Its health, with digests in place of the names of artifacts.
    """
    counts = {b"running": 0, b"waiting": 0}
    for kind, value in _GAUGE.findall(metrics):
        counts[kind] += int(float(value))
    bases = frozenset(map(_digest_or_name, served.bases))
    holds = bases | frozenset(map(_digest_or_name, served.adapters))
    return Health(True, holds, counts[b"running"], counts[b"waiting"], serves=bases)


def _digest_or_name(name: str) -> str:
    ours = _OUR_NAME.fullmatch(name)
    return name if ours is None else f"sha256:{ours[1]}"
