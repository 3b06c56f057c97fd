"""Ways to tune: which there are, and what each takes."""

from fastapi import APIRouter

from api.deps import PrincipalDep
from api.schemas.base import ListPage, list_object
from api.schemas.jobs import MethodObject
from luthier.methods import discover

router = APIRouter(prefix="/v1/fine_tuning/methods", tags=["fine_tuning"])


@router.get("")
def list_methods(_scope: PrincipalDep) -> ListPage[MethodObject]:
    """List the methods that a job's `tuning` may name, each with the JSON schema of that object."""
    data = [
        MethodObject.of(
            method,
            parameters=method.Params.model_json_schema(),
            loads_in_peft=method.library_name == "peft",
        )
        for method in discover().values()
    ]
    return list_object(data, has_more=False)
