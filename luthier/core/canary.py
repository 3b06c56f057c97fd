"""What training recorded of a model's answer to a short text, for whoever serves it to compare with."""

from pydantic import BaseModel, ConfigDict

CANARY_NAME = "canary.json"


class Canary(BaseModel):
    """A text and some of the logits after it.

    `logits` are those of the tokens `candidates`, the likeliest first; `precision` is the type of the weights
    that gave them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    token_ids: list[int]
    candidates: list[int]
    logits: list[float]
    precision: str
