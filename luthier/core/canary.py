"""What training recorded of a model's answer to a short text, for whoever serves it to compare with."""

from pydantic import BaseModel, ConfigDict, Field

CANARY_NAME = "canary.json"
# More than this would excuse other weights as well.
MOST_ROUNDING = 0.25


class Canary(BaseModel):
    """A text and some of the logits after it.

    `logits` are those of the tokens `candidates`, the likeliest first. `precision` is the type of the weights
    that gave them; they are computed in float32 whatever it is (older records: in that type). `rounding` is
    how far off that type's own logits are in training, as the norm of the gap relative to the logits' norm.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    token_ids: list[int]
    candidates: list[int]
    logits: list[float]
    precision: str
    rounding: float = Field(0.0, ge=0, le=MOST_ROUNDING)
