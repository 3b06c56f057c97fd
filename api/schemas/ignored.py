"""Fields that real clients send and that mean nothing here: taken and thrown away. All others are refused.

The one place for bodies that the API reads. Chats are read by the inference server, whose list is
luthier/inference/protocol.py: IGNORED_FIELDS.
"""

from collections.abc import Mapping
from typing import Any

# Of POST /v1/fine_tuning/jobs. The OpenAI SDKs send nothing beyond OpenAI's fields, but of `method` all three
# configurations at times: MethodBody takes them, and reads the one that `type` names.
JOB_FIELDS = frozenset(
    {
        # Azure's word for which of its pools of machines is to train.
        "trainingType",
    }
)


def without_ignored(body: Any, names: frozenset[str]) -> Any:
    """Return an object without the fields that mean nothing; what is no object is returned as it is."""
    if not isinstance(body, Mapping):
        return body
    return {name: value for name, value in body.items() if name not in names}
