"""Chat completions, completions and responses: the API resolves the model, an inference server answers."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from api.deps import AppState, AppStateDep
from api.schemas.answers import EVENT_STREAM, ChatCompletion, Completion, ResponseObject
from api.streaming.chat_proxy import RESPONSES_PATH, ask
from api.streaming.chat_request import read_body, read_model_name, resolve_target
from services.accounts.usage import TokenCounts

router = APIRouter(prefix="/v1", tags=["inference"])


def _documented_as(model: Any) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": model, "content": EVENT_STREAM}}


async def _answer(request: Request, state: AppState, path: str) -> Response:
    async with read_body(request, state) as body:
        target = await resolve_target(request, state, await read_model_name(body))
        usage = TokenCounts()
        request.state.model, request.state.usage = target.model, usage
        return await ask(request, state.backend, path, body, target, usage)


@router.post("/chat/completions", responses=_documented_as(ChatCompletion))
async def create_chat_completion(request: Request, state: AppStateDep) -> Response:
    """Answer a chat, streamed or whole, with a base or a tuned model."""
    return await _answer(request, state, "/v1/chat/completions")


@router.post("/completions", responses=_documented_as(Completion))
async def create_completion(request: Request, state: AppStateDep) -> Response:
    """Continue a text, streamed or whole, with a base or a tuned model."""
    return await _answer(request, state, "/v1/completions")


@router.post("/responses", responses=_documented_as(ResponseObject))
async def create_response(request: Request, state: AppStateDep) -> Response:
    """Answer an input, streamed or whole, with a base or a tuned model; nothing is kept."""
    return await _answer(request, state, RESPONSES_PATH)
