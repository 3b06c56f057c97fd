"""What training recorded of a model's answer to a short text, for whoever serves it to compare with."""

from pydantic import BaseModel, ConfigDict, Field

CANARY_NAME = "canary.json"
# More than this would excuse other weights as well.
MOST_ROUNDING = 0.25
# Chance says whether another engine is nearer to float32 than training's own path was.
_LARGEST_RATIO = 2.0


class Canary(BaseModel):
    """A text and some of the logits after it.

    `logits` are those of the tokens `candidates`, the likeliest first. `precision` is the type of the weights
    that gave them; they are computed in float32 whatever it is (older records: in that type). `rounding` is
    how far off that type's own logits were in training, as the norm of the gap relative to the logits' norm,
    at most `MOST_ROUNDING`: weights that amplify it more are served in float32 alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    token_ids: list[int]
    candidates: list[int]
    logits: list[float]
    precision: str
    rounding: float = Field(0.0, ge=0, le=MOST_ROUNDING)

    @property
    def allowed_rounding(self) -> float:
        """How far off an engine that computes in such a type may be, where that is more than usual."""
        return min(_LARGEST_RATIO * self.rounding, MOST_ROUNDING)
