"""API keys and usage, the latter in OpenAI's shapes."""

from typing import Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from api.schemas.base import Body
from db.tables import ApiKey
from services.accounts.usage import UsageBucket, UsageResult


class CreateKeyBody(Body):
    """Body of POST /v1/keys; `project` is the name of the project that the key opens, made when new."""

    name: str = Field(min_length=1, max_length=64)
    project: str | None = Field(None, min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")
    is_admin: bool = Field(False, strict=True)


class KeyObject(TypedDict):
    """An API key; `key`, its plain text, is only in the answer that made it."""

    id: str
    object: Literal["api_key"]
    name: str
    prefix: str
    project: str
    project_id: str
    is_admin: bool
    created_at: int
    last_used_at: int | None
    key: NotRequired[str]


def key_object(key: ApiKey, project_name: str, plain_text: str | None = None) -> KeyObject:
    """Return a key as clients see it, with its plain text in the answer that made it."""
    body: KeyObject = {
        "id": key.id,
        "object": "api_key",
        "name": key.name,
        "prefix": key.prefix,
        "project": project_name,
        "project_id": key.project_id,
        "is_admin": key.is_admin,
        "created_at": int(key.created_at.timestamp()),
        "last_used_at": None if key.last_used_at is None else int(key.last_used_at.timestamp()),
    }
    if plain_text is not None:
        body["key"] = plain_text
    return body


class UsageResultObject(TypedDict):
    """Tokens of one group. What was not grouped by is null; what this service does not have is null or 0."""

    object: Literal["organization.usage.completions.result"]
    input_tokens: int
    output_tokens: int
    input_cached_tokens: int
    input_audio_tokens: int
    output_audio_tokens: int
    num_model_requests: int
    project_id: str | None
    user_id: None
    api_key_id: str | None
    model: str | None
    batch: None


class UsageBucketObject(TypedDict):
    """The results of one period, in Unix seconds."""

    object: Literal["bucket"]
    start_time: int
    end_time: int
    results: list[UsageResultObject]


class UsagePage(TypedDict):
    """GET /v1/organization/usage/completions."""

    object: Literal["page"]
    data: list[UsageBucketObject]
    has_more: bool
    next_page: str | None


def usage_page(buckets: list[UsageBucket], next_page: str | None) -> UsagePage:
    """Return a page of usage as clients see it."""
    return {
        "object": "page",
        "data": [
            {
                "object": "bucket",
                "start_time": bucket.start_time,
                "end_time": bucket.end_time,
                "results": [_result(result) for result in bucket.results],
            }
            for bucket in buckets
        ],
        "has_more": next_page is not None,
        "next_page": next_page,
    }


def _result(result: UsageResult) -> UsageResultObject:
    return {
        "object": "organization.usage.completions.result",
        "input_tokens": result.counts.input_tokens,
        "output_tokens": result.counts.output_tokens,
        "input_cached_tokens": result.counts.input_cached_tokens,
        "input_audio_tokens": 0,
        "output_audio_tokens": 0,
        "num_model_requests": result.counts.num_requests,
        "project_id": result.project_id,
        "user_id": None,
        "api_key_id": result.api_key_id,
        "model": result.model,
        "batch": None,
    }
