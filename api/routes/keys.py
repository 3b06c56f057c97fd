"""API keys; ours, not OpenAI's. All of it asks for an admin key."""

from fastapi import APIRouter

from api.deps import PrincipalDep, SessionDep
from api.schemas.accounts import CreateKeyBody, KeyObject
from api.schemas.base import DeletedObject, ListPage, list_object
from services.accounts import keys

router = APIRouter(prefix="/v1/keys", tags=["keys"])


@router.post("")
def create_key(body: CreateKeyBody, session: SessionDep, principal: PrincipalDep) -> KeyObject:
    """Make a key; its plain text is in this answer and nowhere else."""
    row, project_name, key = keys.create(
        session, principal, name=body.name, project_name=body.project, is_admin=body.is_admin
    )
    return KeyObject.of(row, project=project_name, key=key)


@router.get("")
def list_keys(session: SessionDep, principal: PrincipalDep) -> ListPage[KeyObject]:
    """List the organization's keys."""
    data = [KeyObject.of(row, project=name) for row, name in keys.list_(session, principal)]
    return list_object(data, has_more=False)


@router.delete("/{key_id}")
def revoke_key(key_id: str, session: SessionDep, principal: PrincipalDep) -> DeletedObject:
    """Revoke a key; it opens nothing from the next request on."""
    keys.revoke(session, principal, key_id)
    return {"id": key_id, "object": "api_key", "deleted": True}
