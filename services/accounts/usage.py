"""Usage of inference: recorded per key and model, reported in buckets of time. No prices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field
from sqlalchemy import BigInteger, Row, cast, func, insert, select
from sqlalchemy.orm import Session

from db.tables import UsageEvent
from luthier.core.errors import InvalidValueError
from luthier.core.ids import new_id
from luthier.core.inference import TokenCounts
from services.accounts.auth import Principal

BucketWidth = Literal["1m", "1h", "1d"]
GroupBy = Literal["project_id", "api_key_id", "model"]
Names = Annotated[list[str], Field(max_length=100)]

_WIDTH_SECONDS: dict[BucketWidth, int] = {"1m": 60, "1h": 3600, "1d": 86400}
# Buckets of one page: by default and at most, as OpenAI has them.
_PAGE_BUCKETS: dict[BucketWidth, tuple[int, int]] = {"1m": (60, 1440), "1h": (24, 168), "1d": (7, 31)}
_GROUP_COLUMNS = {
    "project_id": UsageEvent.project_id,
    "api_key_id": UsageEvent.created_by_key_id,
    "model": UsageEvent.model,
}
_SUMMED_COLUMNS = (
    UsageEvent.num_requests,
    UsageEvent.input_tokens,
    UsageEvent.input_cached_tokens,
    UsageEvent.output_tokens,
)
_PAGE_PREFIX = "page_"
_MAX_TIME = 2**32


@dataclass(frozen=True)
class UsageOwner:
    """Whose usage it is, and of which public model name."""

    organization_id: str
    project_id: str
    key_id: str
    model: str


class UsageQuery(BaseModel):
    """A query of usage. Times in Unix seconds; an empty filter matches everything."""

    start_time: int = Field(ge=0, le=_MAX_TIME)
    end_time: int | None = Field(None, ge=0, le=_MAX_TIME)
    bucket_width: BucketWidth = "1d"
    limit: int | None = Field(None, ge=1)
    page: str | None = None
    # The SDKs send lists in brackets, curl's examples plainly.
    group_by: list[GroupBy] = []
    group_by_: list[GroupBy] = Field([], alias="group_by[]")
    project_ids: Names = []
    project_ids_: Names = Field([], alias="project_ids[]")
    api_key_ids: Names = []
    api_key_ids_: Names = Field([], alias="api_key_ids[]")
    models: Names = []
    models_: Names = Field([], alias="models[]")


@dataclass
class UsageBucket:
    """The counts of one interval of time, in Unix seconds: a row for each group."""

    start_time: int
    end_time: int
    results: list[Row[Any]] = field(default_factory=list)


def record(session: Session, counts: Mapping[UsageOwner, TokenCounts]) -> None:
    """Store what was used since the last time, a row for each owner."""
    rows = [
        {
            "id": new_id("event"),
            "organization_id": owner.organization_id,
            "project_id": owner.project_id,
            "created_by_key_id": owner.key_id,
            "kind": "inference",
            "quantity": used.input_tokens + used.output_tokens,
            "unit": "tokens",
            "model": owner.model,
            **vars(used),
        }
        for owner, used in counts.items()
    ]
    session.execute(insert(UsageEvent), rows)


def completions(
    session: Session, principal: Principal, query: UsageQuery
) -> tuple[list[UsageBucket], str | None]:
    """Report the usage of inference in buckets that begin at multiples of their width.

    An admin key sees its organization, any other key its project. Empty buckets are included; the second
    value is the cursor of the next page, None after the last.
    """
    width = _WIDTH_SECONDS[query.bucket_width]
    start, end = _range(query)
    limit = _limit(query)
    first = _first_bucket(query, start, width)
    stop = min(first + limit * width, end)
    if first >= stop:
        return [], None
    buckets = {at: UsageBucket(at, at + width) for at in range(first, stop, width)}
    for row in _read(session, principal, query, max(first, start), stop, width):
        buckets[row.bucket].results.append(row)
    next_page = f"{_PAGE_PREFIX}{stop}" if stop < end else None
    return list(buckets.values()), next_page


def _range(query: UsageQuery) -> tuple[int, int]:
    now = int(datetime.now(UTC).timestamp())
    # Nothing was used after now; without this a page could be asked for up to the end of time.
    end = min(now + 1, query.end_time if query.end_time is not None else now + 1)
    if query.end_time is not None and query.end_time <= query.start_time:
        raise InvalidValueError("end_time: send a time after start_time.", param="end_time")
    return query.start_time, end


def _limit(query: UsageQuery) -> int:
    default, most = _PAGE_BUCKETS[query.bucket_width]
    limit = default if query.limit is None else query.limit
    if limit > most:
        raise InvalidValueError(
            f"limit: at most {most} buckets of {query.bucket_width} fit on a page.", param="limit"
        )
    return limit


def _first_bucket(query: UsageQuery, start: int, width: int) -> int:
    if query.page is None:
        return start - start % width
    number = query.page.removeprefix(_PAGE_PREFIX)
    if not number.isdecimal() or len(number) > 12 or int(number) % width:
        raise InvalidValueError("page: send the next_page of the page before.", param="page")
    return int(number)


def _read(
    session: Session, principal: Principal, query: UsageQuery, start: int, stop: int, width: int
) -> Sequence[Any]:
    seconds = cast(func.floor(func.extract("epoch", UsageEvent.created_at)), BigInteger)
    bucket = (seconds - seconds % width).label("bucket")
    groups = [_GROUP_COLUMNS[name].label(name) for name in dict.fromkeys(query.group_by + query.group_by_)]
    sums = [cast(func.sum(column), BigInteger).label(column.key) for column in _SUMMED_COLUMNS]
    statement = (
        select(bucket, *sums, *groups)
        .where(
            UsageEvent.organization_id == principal.organization_id,
            UsageEvent.kind == "inference",
            UsageEvent.created_at >= datetime.fromtimestamp(start, UTC),
            UsageEvent.created_at < datetime.fromtimestamp(stop, UTC),
        )
        .group_by(bucket, *groups)
        .order_by(bucket, *groups)
    )
    if not principal.is_admin:
        statement = statement.where(UsageEvent.project_id == principal.project_id)
    for column, allowed in (
        (UsageEvent.project_id, query.project_ids + query.project_ids_),
        (UsageEvent.created_by_key_id, query.api_key_ids + query.api_key_ids_),
        (UsageEvent.model, query.models + query.models_),
    ):
        if allowed:
            statement = statement.where(column.in_(allowed))
    return session.execute(statement).all()
