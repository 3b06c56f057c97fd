"""Ways to tune: which there are, and what each takes."""

from fastapi import APIRouter

from api.deps import PrincipalDep
from api.schemas.base import ListPage, list_object
from api.schemas.jobs import MethodObject, method_object
from luthier.methods import discover

router = APIRouter(prefix="/v1/fine_tuning/methods", tags=["fine_tuning"])


@router.get("")
def list_methods(_scope: PrincipalDep) -> ListPage[MethodObject]:
    """List the methods that a job's `tuning` may name, each with the JSON schema of that object."""
    return list_object([method_object(method) for method in discover().values()], has_more=False)
