"""Usage of inference, as OpenAI's organization endpoints report it."""

from typing import Annotated

from fastapi import APIRouter, Query

from api.deps import PrincipalDep, SessionDep
from api.schemas.accounts import UsagePage, usage_page
from services.accounts import usage
from services.accounts.usage import BucketWidth, GroupBy, UsageQuery

router = APIRouter(prefix="/v1/organization/usage", tags=["usage"])

_MAX_TIME = 2**32
Time = Annotated[int, Query(ge=0, le=_MAX_TIME)]
# The SDKs send lists in brackets, curl's examples plainly.
Names = Annotated[list[str], Query(max_length=100)]


@router.get("/completions")
def completions_usage(
    session: SessionDep,
    principal: PrincipalDep,
    start_time: Time,
    end_time: Time | None = None,
    bucket_width: BucketWidth = "1d",
    limit: Annotated[int | None, Query(ge=1)] = None,
    page: str | None = None,
    group_by: Annotated[list[GroupBy], Query()] = [],  # noqa: B006 - FastAPI copies it
    group_by_: Annotated[list[GroupBy], Query(alias="group_by[]")] = [],  # noqa: B006
    project_ids: Names = [],  # noqa: B006
    project_ids_: Annotated[Names, Query(alias="project_ids[]")] = [],  # noqa: B006
    api_key_ids: Names = [],  # noqa: B006
    api_key_ids_: Annotated[Names, Query(alias="api_key_ids[]")] = [],  # noqa: B006
    models: Names = [],  # noqa: B006
    models_: Annotated[Names, Query(alias="models[]")] = [],  # noqa: B006
) -> UsagePage:
    """Report requests and tokens of chats, completions and responses; an admin key sees all projects."""
    query = UsageQuery(
        start_time=start_time,
        end_time=end_time,
        bucket_width=bucket_width,
        limit=limit,
        page=page,
        group_by=group_by + group_by_,
        project_ids=project_ids + project_ids_,
        api_key_ids=api_key_ids + api_key_ids_,
        models=models + models_,
    )
    return usage_page(*usage.completions(session, principal, query))
