"""API keys and usage, the latter in OpenAI's shapes."""

from typing import Literal

from pydantic import Field

from api.schemas.base import Absent, Answer, Body, Timestamp, absent_if_none


class CreateKeyBody(Body):
    """Body of POST /v1/keys; `project` is the name of the project that the key opens, made when new."""

    name: str = Field(min_length=1, max_length=64)
    project: str | None = Field(None, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")
    is_admin: bool = Field(False, strict=True)


class KeyObject(Answer):
    """An API key; `key`, its plain text, is only in the answer that made it."""

    id: str
    object: Literal["api_key"] = "api_key"
    name: str
    prefix: str
    project: str
    project_id: str
    is_admin: bool
    created_at: Timestamp
    last_used_at: Timestamp | None
    key: str | Absent = absent_if_none()


class UsageResultObject(Answer):
    """Tokens of one group. What was not grouped by is null; what this service does not have is null or 0."""

    object: Literal["organization.usage.completions.result"] = "organization.usage.completions.result"
    input_tokens: int
    output_tokens: int
    input_cached_tokens: int
    input_audio_tokens: int = 0
    output_audio_tokens: int = 0
    num_model_requests: int = Field(validation_alias="num_requests")
    project_id: str | None = None
    user_id: None = None
    api_key_id: str | None = None
    model: str | None = None
    batch: None = None


class UsageBucketObject(Answer):
    """The results of one period, in Unix seconds."""

    object: Literal["bucket"] = "bucket"
    start_time: int
    end_time: int
    results: list[UsageResultObject]


class UsagePage(Answer):
    """GET /v1/organization/usage/completions."""

    object: Literal["page"] = "page"
    data: list[UsageBucketObject]
    has_more: bool
    next_page: str | None
