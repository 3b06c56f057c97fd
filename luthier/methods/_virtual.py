"""Base of prefix and prompt tuning: shared parameters, and a method whose weights PEFT's encoder holds."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, StringConstraints, ValidationInfo
from pydantic_core import PydanticCustomError

from luthier.core.specs import Auto, BaseFacts
from luthier.methods._peft import PeftMethod
from luthier.methods.base import Attached, Workload, check_room

if TYPE_CHECKING:
    import torch

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

# A longer automatic prefix would leave too little of the context to the rows.
_MAX_AUTO_SHARE = 8


def check_init_text(value: str | None, info: ValidationInfo) -> str | None:
    """Require `init_text` with `init` "text" and refuse it otherwise; for a field that follows `init`."""
    init = info.data.get("init")
    if init == "text" and value is None:
        raise PydanticCustomError("missing", "is required with init 'text'")
    if value is not None and init is not None and init != "text":
        raise ValueError('It is used by init "text" alone; set init to "text" or leave it out')
    return value


class VirtualTokenMethod(PeftMethod):
    """A method that trains virtual tokens before the sequence; PEFT's encoder holds them.

    `most_auto_tokens` is what "auto" is at most.
    """

    most_auto_tokens: ClassVar[int]
    starting_params: ClassVar[frozenset[str]] = frozenset({"init", "init_text"})
    starts_as_base: ClassVar[bool] = False
    loading: ClassVar[str] = (
        "Load it with `peft.PeftModel.from_pretrained(base, folder)`, and call the model itself: PEFT's "
        "`generate` gives other answers with transformers 5 (peft 0.21, transformers 5.24). The likeliest "
        f"answer to one text:\n\n```python\n{ANSWER}```"
    )

    def num_reserved_positions(self, params: Any, *, base: BaseFacts) -> int:
        """Return the virtual tokens, or the most that "auto" takes."""
        if params.num_virtual_tokens != "auto":
            return int(params.num_virtual_tokens)
        return _auto_tokens(self.most_auto_tokens, base)

    def save(self, attached: Attached, folder: Path) -> list[str]:
        from luthier.methods._virtual_tensors import save_encoded

        return save_encoded(attached, folder)

    def take_weights(self, attached: Attached, folder: Path) -> None:
        """Begin at saved vectors; a projection, dropped on saving, begins anew without effect."""
        from luthier.methods._virtual_tensors import take_encoded

        take_encoded(attached, folder)

    def logits(self, attached: Attached, token_ids_BT: "torch.Tensor") -> "torch.Tensor":
        """Run PEFT's model, and leave out the results of the virtual tokens."""
        from luthier.methods._virtual_tensors import check_length

        check_length(attached, token_ids_BT)
        return super().logits(attached, token_ids_BT)[:, -token_ids_BT.shape[1] :]


def resolve_num_tokens(params: Any, workload: Workload, wanted: int) -> int:
    """Return how many virtual tokens a job has: `wanted` of "auto", at most an eighth of the context.

    Raises:
        InvalidValueError: when they leave no position for a real token.
    """
    num_tokens = params.num_virtual_tokens
    if num_tokens == "auto":
        num_tokens = _auto_tokens(wanted, workload.base)
    check_room(num_tokens, workload.base.context_length)
    return int(num_tokens)


def _auto_tokens(wanted: int, base: BaseFacts) -> int:
    return max(1, min(wanted, base.context_length // _MAX_AUTO_SHARE))
