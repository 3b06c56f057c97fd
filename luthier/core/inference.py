"""The internal protocol between service and inference server, beside OpenAI's.

The API names its target in headers. A worker borrows memory for a job.
"""

from dataclasses import dataclass
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from luthier.core.specs import Frozen

LOANS_PATH = "/internal/loans"

HEADER_TOKEN = "x-luthier-token"
HEADER_BASE = "x-luthier-base"
HEADER_ARTIFACT = "x-luthier-artifact"
HEADER_DIGEST = "x-luthier-digest"
HEADER_FULL_MODEL = "x-luthier-foundation"
HEADER_FULL_MODEL_DIGEST = "x-luthier-foundation-digest"
HEADER_MODEL = "x-luthier-model"
HEADER_PROJECT = "x-luthier-project"
HEADER_PINNED = "x-luthier-pinned"
# The usage of an answer; of a stream that of its prompts. On a request it asks for a final usage event.
HEADER_USAGE = "x-luthier-usage"
# Begins that event, a comment that the API removes. Line breaks in an answer's text are escaped in JSON.
USAGE_EVENT = b": usage "


class TokenUsage(NamedTuple):
    """Tokens of a request; cached ones are among the input's."""

    input_tokens: int
    input_cached_tokens: int
    output_tokens: int

    def to_text(self) -> str:
        """Return it as header and event have it."""
        return ",".join(map(str, self))

    def to_event(self) -> bytes:
        """Return the event that goes before a stream's last one."""
        return USAGE_EVENT + self.to_text().encode() + b"\n\n"

    @classmethod
    def from_text(cls, text: str) -> "TokenUsage":
        """Read what a header or an event has."""
        return cls(*map(int, text.split(",")))


@dataclass
class TokenCounts:
    """Requests and their tokens; cached ones are among the input's."""

    num_requests: int = 0
    input_tokens: int = 0
    input_cached_tokens: int = 0
    output_tokens: int = 0

    def add(self, other: "TokenCounts") -> None:
        """Add another's counts."""
        self.num_requests += other.num_requests
        self.input_tokens += other.input_tokens
        self.input_cached_tokens += other.input_cached_tokens
        self.output_tokens += other.output_tokens


class ModelTarget(Frozen):
    """The target that a public model name resolved to, once per request.

    `artifact` is the storage prefix of the artifact folder and `digest` its manifest's digest; both are
    None for a bare base. `full_model` and `full_model_digest` are the same of the full model below the
    artifact, where that is not the base itself. `model` is the public name, which answers repeat. A pinned
    model stays in memory until a request for it is not pinned.
    """

    model: str
    base_id: str
    project_id: str
    artifact: str | None = None
    digest: str | None = None
    full_model: str | None = None
    full_model_digest: str | None = None
    is_pinned: bool = False
    # The resolved name where `model` is an alias or a mapped name; the server does not need it.
    resolved_model: str | None = None

    def to_headers(self) -> dict[str, str]:
        """Return the headers that carry this target to the inference server."""
        headers = {
            HEADER_MODEL: self.model,
            HEADER_BASE: self.base_id,
            HEADER_PROJECT: self.project_id,
            HEADER_ARTIFACT: self.artifact,
            HEADER_DIGEST: self.digest,
            HEADER_FULL_MODEL: self.full_model,
            HEADER_FULL_MODEL_DIGEST: self.full_model_digest,
            HEADER_PINNED: "1" if self.is_pinned else None,
        }
        return {name: value for name, value in headers.items() if value is not None}


class LoanRequest(Frozen):
    """A request for bytes of a server's idle KV cache for a job on the same device; replaces an earlier loan.

    `hostname` is None where the server is on the job's machine. Less than `least_bytes` is useless; 0 for
    `num_bytes` returns the loan, which lapses after `seconds`.
    """

    hostname: str | None
    device: str
    loan_id: str
    num_bytes: int = Field(ge=0)
    least_bytes: int = Field(ge=0)
    seconds: float = Field(gt=0)


class MemoryLoan(BaseModel):
    """The bytes that a server lends; 0 for none."""

    model_config = ConfigDict(frozen=True)

    lent_bytes: int
