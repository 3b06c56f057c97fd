"""Usage of inference, as OpenAI's organization endpoints report it."""

from typing import Annotated

from fastapi import APIRouter, Query

from api.deps import PrincipalDep, SessionDep
from api.schemas.accounts import UsageBucketObject, UsagePage, UsageResultObject
from services.accounts import usage
from services.accounts.usage import UsageQuery

router = APIRouter(prefix="/v1/organization/usage", tags=["usage"])


@router.get("/completions")
def completions_usage(
    session: SessionDep, principal: PrincipalDep, query: Annotated[UsageQuery, Query()]
) -> UsagePage:
    """Report requests and tokens of chats, completions and responses; an admin key sees all projects."""
    buckets, next_page = usage.completions(session, principal, query)
    data = [
        UsageBucketObject.of(bucket, results=[UsageResultObject.of(row) for row in bucket.results])
        for bucket in buckets
    ]
    return UsagePage(data=data, has_more=next_page is not None, next_page=next_page)
