"""What clients hear of every failure: OpenAI's error body, with all four members."""

from pydantic import BaseModel, Field


class ErrorDetail(BaseModel):
    """What went wrong; docs/errors.md has every code."""

    message: str
    type: str
    param: str | None = Field(description="The offending field, dotted where it lies within another.")
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorDetail
