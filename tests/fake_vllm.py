"""A vLLM that holds no weights: its endpoints and its refusals as version 0.32 has them, over HTTP."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from luthier.core.specs import CANARY_NAME

_USAGE = {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3}


def refusal(status: int, message: str) -> JSONResponse:
    error = {"message": message, "type": "some", "param": None, "code": status}
    return JSONResponse({"error": error}, status)


@dataclass
class FakeVllm:
    """Answers with the name of the model that was asked, token by token."""

    base: str
    adapters: dict[str, Path] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    unloads: list[str] = field(default_factory=list)
    tokens: list[str | None] = field(default_factory=list)
    # Whether an adapter changes what is said.
    has_effect: bool = True
    num_running: int = 0
    gate: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def __post_init__(self) -> None:
        self.gate.set()

    async def models(self, request: Request) -> Response:
        self.tokens.append(request.headers.get("authorization"))
        cards = [{"id": self.base, "parent": None, "root": "/bases/x"}]
        cards += [
            {"id": name, "parent": self.base, "root": str(path)} for name, path in self.adapters.items()
        ]
        return JSONResponse({"object": "list", "data": cards})

    async def load(self, request: Request) -> Response:
        asked = await request.json()
        name, path = asked["lora_name"], Path(asked["lora_path"])
        self.loads.append(name)
        if name in self.adapters:
            return refusal(400, f"The lora adapter '{name}' has already been loaded.")
        config = json.loads((path / "adapter_config.json").read_text())
        if config["r"] > 16:
            return refusal(500, f"LoRA rank {config['r']} is greater than max_lora_rank 16.")
        self.adapters[name] = path
        return PlainTextResponse("Success")

    async def unload(self, request: Request) -> Response:
        name = (await request.json())["lora_name"]
        self.unloads.append(name)
        if self.adapters.pop(name, None) is None:
            return refusal(404, f"The lora adapter '{name}' cannot be found.")
        return PlainTextResponse("Success")

    async def metrics(self, _request: Request) -> Response:
        return PlainTextResponse(
            'vllm:num_requests_running{engine="0",model_name="x"} 3.0\n'
            'vllm:num_requests_waiting{engine="0",model_name="x"} 2.0\n'
            'vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 2.0\n'
        )

    async def complete(self, request: Request) -> Response:
        asked = await request.json()
        name = asked.get("model")
        if name != self.base and name not in self.adapters:
            return refusal(404, f"The model `{name}` does not exist.")
        if "logprob_token_ids" in asked:
            return self._logprobs(asked)
        self.asked.append(asked)
        if asked.get("n") == 99:
            return refusal(400, "n is too large for max_num_seqs.")
        if len(str(asked.get("prompt", ""))) > 1000:
            return refusal(400, "This model's maximum context length is 256 tokens.")
        is_chat = request.url.path.endswith("chat/completions")
        if asked.get("stream"):
            return StreamingResponse(self._events(name, is_chat, asked), media_type="text/event-stream")
        self.num_running += 1
        await asyncio.to_thread(self.gate.wait)
        self.num_running -= 1
        message = {"role": "assistant", "content": f"I am {name}", "tool_calls": [], "reasoning": None}
        said = {"message": message} if is_chat else {"text": f"I am {name}"}
        choice = {"index": 0, "finish_reason": "stop", "stop_reason": 7, "token_ids": None, **said}
        return JSONResponse(self._object(name, [choice]) | {"usage": _USAGE})

    def _object(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": "cmpl-1",
            "object": "o",
            "created": 5,
            "model": name,
            "choices": choices,
            "system_fingerprint": "vllm-0.32",
            "kv_transfer_params": None,
        }

    async def _events(self, name: str, is_chat: bool, asked: dict[str, Any]) -> AsyncGenerator[str]:
        self.num_running += 1
        try:
            for word in ("I am ", name):
                said = {"delta": {"content": word}} if is_chat else {"text": word}
                yield f"data: {json.dumps(self._object(name, [{'index': 0, **said}]))}\n\n"
                await asyncio.to_thread(self.gate.wait)
            if asked.get("stream_options", {}).get("include_usage"):
                yield f"data: {json.dumps(self._object(name, []) | {'usage': _USAGE})}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            self.num_running -= 1

    def _logprobs(self, asked: dict[str, Any]) -> Response:
        path = self.adapters.get(asked["model"])
        values = {token: -float(token % 7) - 1 for token in asked["logprob_token_ids"]}
        if path is not None and self.has_effect:
            canary = json.loads((path / CANARY_NAME).read_text())
            # Log-probabilities are logits less a number of their own.
            values = {t: v - 30 for t, v in zip(canary["candidates"], canary["logits"], strict=True)}
        place = {f"token_id:{token}": values[token] for token in asked["logprob_token_ids"]}
        choice = {"index": 0, "text": "x", "logprobs": {"top_logprobs": [place]}}
        return JSONResponse(self._object(asked["model"], [choice]))

    @contextlib.contextmanager
    def serving(self) -> Iterator["FakeVllm"]:
        app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/metrics", self.metrics),
                Route("/v1/load_lora_adapter", self.load, methods=["POST"]),
                Route("/v1/unload_lora_adapter", self.unload, methods=["POST"]),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/v1/chat/completions", self.complete, methods=["POST"]),
            ]
        )
        server = uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive()
        self.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        try:
            yield self
        finally:
            self.gate.set()
            server.should_exit = True
            thread.join(10)
