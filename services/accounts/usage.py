"""Usage of inference: recorded per key and model, reported in buckets of time. No prices."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal

from sqlalchemy import BigInteger, cast, func, insert, select
from sqlalchemy.orm import Session

from db.tables import UsageEvent
from luthier.core.errors import InvalidValueError
from luthier.core.ids import new_id
from luthier.core.inference import TokenCounts
from services.accounts.auth import Principal

BucketWidth = Literal["1m", "1h", "1d"]
GroupBy = Literal["project_id", "api_key_id", "model"]

_WIDTH_SECONDS: dict[BucketWidth, int] = {"1m": 60, "1h": 3600, "1d": 86400}
# Buckets of one page: by default and at most, as OpenAI has them.
_PAGE_BUCKETS: dict[BucketWidth, tuple[int, int]] = {"1m": (60, 1440), "1h": (24, 168), "1d": (7, 31)}
_GROUP_COLUMNS = {
    "project_id": UsageEvent.project_id,
    "api_key_id": UsageEvent.created_by_key_id,
    "model": UsageEvent.model,
}
_PAGE_PREFIX = "page_"


@dataclass(frozen=True)
class UsageOwner:
    """Whose usage it is, and of which public model name."""

    organization_id: str
    project_id: str
    key_id: str
    model: str


@dataclass(frozen=True)
class UsageQuery:
    """A query of usage. Times in Unix seconds; an empty filter matches everything."""

    start_time: int
    end_time: int | None
    bucket_width: BucketWidth
    limit: int | None
    page: str | None
    group_by: Sequence[GroupBy] = ()
    project_ids: Sequence[str] = ()
    api_key_ids: Sequence[str] = ()
    models: Sequence[str] = ()


@dataclass
class UsageResult:
    """The counts of one group; a member is None unless it was grouped by."""

    counts: TokenCounts
    project_id: str | None = None
    api_key_id: str | None = None
    model: str | None = None


@dataclass
class UsageBucket:
    """The results of one interval of time, in Unix seconds."""

    start_time: int
    end_time: int
    results: list[UsageResult] = field(default_factory=list)


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
            "num_requests": used.num_requests,
            "input_tokens": used.input_tokens,
            "input_cached_tokens": used.input_cached_tokens,
            "output_tokens": used.output_tokens,
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
    for at, result in _read(session, principal, query, max(first, start), stop, width):
        buckets[at].results.append(result)
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
) -> list[tuple[int, UsageResult]]:
    seconds = cast(func.floor(func.extract("epoch", UsageEvent.created_at)), BigInteger)
    bucket = (seconds - seconds % width).label("bucket")
    groups = list(dict.fromkeys(query.group_by))
    columns = [_GROUP_COLUMNS[name] for name in groups]
    sums = (
        UsageEvent.num_requests,
        UsageEvent.input_tokens,
        UsageEvent.input_cached_tokens,
        UsageEvent.output_tokens,
    )
    statement = (
        select(bucket, *(cast(func.sum(column), BigInteger) for column in sums), *columns)
        .where(
            UsageEvent.organization_id == principal.organization_id,
            UsageEvent.kind == "inference",
            UsageEvent.created_at >= datetime.fromtimestamp(start, UTC),
            UsageEvent.created_at < datetime.fromtimestamp(stop, UTC),
        )
        .group_by(bucket, *columns)
        .order_by(bucket, *columns)
    )
    if not principal.is_admin:
        statement = statement.where(UsageEvent.project_id == principal.project_id)
    for column, allowed in (
        (UsageEvent.project_id, query.project_ids),
        (UsageEvent.created_by_key_id, query.api_key_ids),
        (UsageEvent.model, query.models),
    ):
        if allowed:
            statement = statement.where(column.in_(allowed))
    return [
        (int(row[0]), UsageResult(TokenCounts(*row[1:5]), **dict(zip(groups, row[5:], strict=True))))
        for row in session.execute(statement)
    ]
