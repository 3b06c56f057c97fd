"""The parameters that prefix and prompt tuning share, without torch: the API checks requests by them."""

from typing import Annotated, Any

from pydantic import Field, StringConstraints, ValidationInfo
from pydantic_core import PydanticCustomError

from luthier.core.errors import InvalidValueError
from luthier.core.specs import Auto, BaseFacts
from luthier.methods.base import Workload

NumVirtualTokens = Annotated[int, Field(ge=1, le=1024)] | Auto
InitText = Annotated[str, StringConstraints(min_length=1, max_length=10_000)] | None

# In every artifact's card, and in docs/methods.md; a test runs it.
ANSWER = '''\
def answer(model, ids_1T, num_tokens):
    """Return ids [1, T] with the likeliest tokens after them."""
    for _ in range(num_tokens):
        ids_1T = torch.cat([ids_1T, model(input_ids=ids_1T).logits[:, -1:].argmax(-1)], dim=1)
    return ids_1T
'''
LOADING = (
    "Load it with `peft.PeftModel.from_pretrained(base, folder)`, and call the model itself: PEFT's "
    "`generate` gives other answers with transformers 5 (peft 0.21, transformers 5.24). The likeliest answer "
    f"to one text:\n\n```python\n{ANSWER}```"
)

# A longer automatic prefix would crowd out the rows themselves.
_MAX_AUTO_SHARE = 8


def check_init_text(value: str | None, info: ValidationInfo) -> str | None:
    """Require `init_text` with `init` "text" and refuse it otherwise; for a field that follows `init`."""
    init = info.data.get("init")
    if init == "text" and value is None:
        raise PydanticCustomError("missing", "is required with init 'text'")
    if value is not None and init is not None and init != "text":
        raise ValueError('It is used by init "text" alone; set init to "text" or leave it out')
    return value


def resolve_num_tokens(params: Any, workload: Workload, wanted: int) -> int:
    """Return how many virtual tokens a job has.

    Args:
        params: with `num_virtual_tokens`, a number or "auto".
        wanted: what "auto" is, unless that is more than an eighth of the context.

    Returns:
        The number, at least 1.

    Raises:
        InvalidValueError: when they leave no position for a real token.
    """
    context_length = workload.base.context_length
    num_tokens = params.num_virtual_tokens
    if num_tokens == "auto":
        num_tokens = max(1, min(wanted, context_length // _MAX_AUTO_SHARE))
    check_room(num_tokens, context_length)
    return num_tokens


def most_tokens(params: Any, base: BaseFacts, most: int) -> int:
    """Return the most virtual tokens that a job may come to have, before its rows are known.

    Args:
        params: with `num_virtual_tokens`, a number or "auto".
        most: what "auto" is at most, in a context that is long enough.

    Returns:
        The number, at least 1.
    """
    if params.num_virtual_tokens != "auto":
        return int(params.num_virtual_tokens)
    return max(1, min(most, base.context_length // _MAX_AUTO_SHARE))


def check_room(num_virtual_tokens: int, context_length: int) -> None:
    """Refuse virtual tokens that leave no position for a real one."""
    if num_virtual_tokens >= context_length:
        raise InvalidValueError(
            f"{num_virtual_tokens} virtual tokens leave no room for a real one: this base has "
            f"{context_length} positions. Use fewer.",
            param="tuning.num_virtual_tokens",
        )


def resolved(value: Any) -> int:
    """Return a number that must no longer be "auto"."""
    if not isinstance(value, int):
        raise InvalidValueError('"auto" must be resolved before a method is attached.', param="tuning")
    return value
