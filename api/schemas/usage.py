"""What clients read of usage, in OpenAI's shapes."""

from typing import Literal

from typing_extensions import TypedDict

from services.accounts.usage import UsageBucket, UsageResult


class UsageResultObject(TypedDict):
    """Tokens of one group. What was not grouped by is null; what this service has not is null or 0."""

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
    """The results of one stretch of time, in Unix seconds."""

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
