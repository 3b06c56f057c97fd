"""The client of a vLLM server that serves one base, or one fully tuned model, and LoRA adapters on it.

Adapters are loaded and unloaded through vLLM's own endpoints (its documentation, "LoRA Adapters", dynamically
serving), which it offers with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1. They open any path of its
machine, so it belongs on an internal network.
"""

import asyncio
import json
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from luthier.core.errors import (
    LuthierError,
    ModelNotFoundError,
    SelfCheckError,
    UnavailableError,
    UnsupportedValueError,
)
from luthier.core.inference import HEADER_DIGEST, HEADER_USAGE, ModelTarget
from luthier.core.settings import Settings
from luthier.serving import _vllm_proof
from luthier.serving._vllm_artifacts import Artifacts
from luthier.serving._vllm_wire import (
    COMPLETIONS,
    Renaming,
    Served,
    read_error,
    read_health,
    read_models,
    read_request,
    served_name,
)
from luthier.serving.base import Health, Reply
from luthier.serving.engine import InferenceClient

_KNOWN_SECONDS = 10.0
# A copy that is used for longer is marked again, so that it does not look unused.
_RENEW_SECONDS = 3600.0

_Release = Callable[[], None]


class _Missing(Exception):  # noqa: N818 - no error: the adapter is loaded again
    """The server does not know a name that it was asked for."""


class VllmBackend:
    """Send requests to one vLLM server.

    Args:
        url: `http://host:port`.
        token: the internal token, which is its --api-key.
        settings: folders of artifacts and of their copies, and how many adapters it may hold.
    """

    def __init__(self, url: str, token: str, settings: Settings) -> None:
        self._settings = settings
        self._client = InferenceClient(url, {"authorization": f"Bearer {token}"} if token else {})
        self._artifacts = Artifacts(settings)
        self._adapters = _Adapters(self, max_loaded=settings.vllm_max_adapters)
        self._known = Served(frozenset(), frozenset())
        self._known_at = -_KNOWN_SECONDS

    async def complete(self, path: str, body: bytes, target: ModelTarget) -> Reply:
        """Send a request and return its answer, of a stream as soon as its headers have come.

        Raises:
            NotAcceptedError: when the server can't be reached, so that another may be asked.
            UnavailableError: when it disconnected in the middle.
            ModelNotFoundError: when it serves another base.
            UnsupportedValueError: when vLLM can't serve the model, or what the request asks.
            LuthierError: what vLLM refuses.
        """
        asked = read_request(path, body, max_tokens_default=self._settings.max_tokens_default)
        try:
            return await self._try(path, asked, target)
        except _Missing:
            # Another API process unloaded it, or vLLM was started anew.
            self._known_at = -_KNOWN_SECONDS
        try:
            return await self._try(path, asked, target)
        except _Missing as error:
            raise UnavailableError("vLLM has lost the model twice; try again.") from error

    async def health(self) -> Health:
        served = await self._list()
        _, content = await self._client.get("/metrics")
        return read_health(served, content)

    async def aclose(self) -> None:
        await self._adapters.aclose()
        await self._client.aclose()

    async def list_adapters(self) -> list[str]:
        """Return the names of the adapters that vLLM holds, ours alone."""
        return sorted((await self._list()).adapters)

    async def unload(self, name: str) -> None:
        """Have vLLM forget an adapter; harmless when it does not hold it."""
        # Whatever it says: what it does not forget now is found in its list again.
        await self._post("/v1/unload_lora_adapter", {"lora_name": name})

    async def _try(self, path: str, asked: dict[str, Any], target: ModelTarget) -> Reply:
        name, release = await self._hold(target)
        try:
            return await self._send(path, asked | {"model": name}, target, release)
        except BaseException as error:
            release()
            if isinstance(error, _Missing):
                self._adapters.forget(name)
            raise

    async def _hold(self, target: ModelTarget) -> tuple[str, _Release]:
        """Return the name by which vLLM answers for a model, an adapter loaded, and what releases it."""
        served = await self._list_lately()
        beneath = (
            target.base_id if target.full_model_digest is None else served_name(target.full_model_digest)
        )
        if target.digest is not None and served_name(target.digest) in served.bases:
            return served_name(target.digest), _nothing
        if target.digest is None or target.artifact is None:
            if beneath not in served.bases:
                raise self._not_served(beneath)
            return beneath, _nothing
        name = served_name(target.digest)
        load = partial(self._load, name, target, beneath, served)
        return name, await self._adapters.hold(name, load, is_pinned=target.is_pinned)

    async def _load(self, name: str, target: ModelTarget, beneath: str, served: Served) -> None:
        adapter = await asyncio.to_thread(self._artifacts.prepare, target)
        if beneath not in served.bases:
            raise self._not_served(beneath)
        status, content = await self._post(
            "/v1/load_lora_adapter", {"lora_name": name, "lora_path": adapter.path}
        )
        if status != 200 and name not in (await self._list()).adapters:
            raise _not_loaded(status, content)
        if adapter.canary is None:
            return
        try:
            answers = [
                _vllm_proof.read(await self._prove(_vllm_proof.ask(adapter.canary, one)))
                for one in (name, beneath)
            ]
            _vllm_proof.check(adapter.canary, *answers)
        except LuthierError:
            await self.unload(name)
            raise

    async def _prove(self, asked: dict[str, Any]) -> bytes:
        status, content = await self._post(COMPLETIONS, asked)
        if status != 200:
            raise SelfCheckError(
                f"vLLM did not return what verifies the model: {read_error(status, content).message}"
            )
        return content

    async def _send(self, path: str, asked: dict[str, Any], target: ModelTarget, release: _Release) -> Reply:
        if asked.get("max_tokens") == 0:
            raise UnsupportedValueError(
                "max_tokens must be at least 1: vLLM gives no answer without a token.", param="max_tokens"
            )
        is_stream = bool(asked.get("stream"))
        shows_usage = bool(asked.get("stream_options", {}).get("include_usage"))
        if is_stream:
            asked |= {"stream_options": {"include_usage": True}}
        response = await self._client.post(path, json.dumps(asked).encode())
        async with AsyncExitStack() as stack:
            # Or vLLM would continue an answer that is read by no client.
            stack.push_async_callback(response.aclose)
            if response.status_code == 404:
                raise _Missing
            if response.status_code != 200:
                raise read_error(response.status_code, await self._client.read(response))
            digest = target.digest or await asyncio.to_thread(self._artifacts.base_digest, target.base_id)
            headers = {} if digest is None else {HEADER_DIGEST: digest}
            renaming = Renaming(target.model, digest, shows_usage=shows_usage)
            if not is_stream:
                whole = renaming.whole(await self._client.read(response))
                release()
                headers |= {"content-type": "application/json", HEADER_USAGE: renaming.used.to_text()}
                return Reply(200, headers, whole)
            headers |= {"content-type": "text/event-stream", "cache-control": "no-cache"}
            events = renaming.events(self._client.events(response))
            stack.callback(release)
            return Reply(200, headers, events=events, aclose=stack.pop_all().aclose)

    async def _list_lately(self) -> Served:
        """Return what it served some seconds ago; the names of its own hardly ever change."""
        if time.monotonic() - self._known_at >= _KNOWN_SECONDS:
            await self._list()
        return self._known

    async def _list(self) -> Served:
        status, content = await self._client.get("/v1/models")
        if status != 200:
            raise read_error(status, content)
        self._known, self._known_at = read_models(content), time.monotonic()
        return self._known

    async def _post(self, path: str, content: dict[str, str] | dict[str, Any]) -> tuple[int, bytes]:
        response = await self._client.post(path, json.dumps(content).encode())
        return response.status_code, await self._client.read(response)

    def _not_served(self, name: str) -> ModelNotFoundError:
        return ModelNotFoundError(
            f"No vLLM server of this service serves {name[:80]}. An operator runs `vllm serve FOLDER "
            f"--served-model-name {name[:80]}` and adds its URL to LUTHIER_INFERENCE_URL.",
            param="model",
        )


@dataclass(eq=False)
class _LoadedAdapter:
    """An adapter that is loaded, or on its way."""

    loading: asyncio.Task[None]
    loaded_at: float
    num_holders: int = 0
    is_pinned: bool = False

    @property
    def is_idle(self) -> bool:
        """Whether it may leave."""
        return self.num_holders == 0 and self.loading.done() and not self.is_pinned

    def release(self) -> None:
        self.num_holders -= 1


class _Adapters:
    """The adapters that one server holds: loaded when first wanted, unloaded when unused for longest.

    vLLM never unloads an adapter by itself, so the budget is kept here. Other API processes may load and
    unload at the same server: what they loaded counts, and what they unloaded is loaded again.

    Args:
        max_loaded: adapters that may be loaded; more only while all of them answer.
    """

    def __init__(self, server: "VllmBackend", *, max_loaded: int) -> None:
        self._server = server
        self._max_loaded = max_loaded
        # The one unused for longest first.
        self._entries: OrderedDict[str, _LoadedAdapter] = OrderedDict()
        self._turn = asyncio.Lock()

    async def hold(
        self, name: str, load: Callable[[], Awaitable[None]], *, is_pinned: bool = False
    ) -> _Release:
        """Make sure that an adapter is loaded, where it stays until it is released.

        Args:
            load: loads it; may be called when it is loaded already.
            is_pinned: whether it stays while idle.
        """
        entry = self._entries.get(name)
        if entry is None or time.monotonic() - entry.loaded_at > _RENEW_SECONDS:
            entry = self._enter(name, load)
        self._entries.move_to_end(name)
        entry.num_holders += 1
        entry.is_pinned = is_pinned
        try:
            await asyncio.shield(entry.loading)
        except BaseException:
            entry.release()
            raise
        return entry.release

    def forget(self, name: str) -> None:
        self._entries.pop(name, None)

    async def aclose(self) -> None:
        """Stop what is being loaded."""
        for entry in self._entries.values():
            entry.loading.cancel()

    def _enter(self, name: str, load: Callable[[], Awaitable[None]]) -> _LoadedAdapter:
        loading = asyncio.ensure_future(self._load(name, load))
        entry = self._entries[name] = _LoadedAdapter(loading, time.monotonic())

        def on_loaded(_loading: asyncio.Task[None]) -> None:
            has_failed = loading.cancelled() or loading.exception() is not None
            if has_failed and self._entries.get(name) is entry:
                self.forget(name)

        loading.add_done_callback(on_loaded)
        return entry

    async def _load(self, name: str, load: Callable[[], Awaitable[None]]) -> None:
        async with self._turn:
            await self._make_room(name)
            await load()

    async def _make_room(self, name: str) -> None:
        loaded = set(await self._server.list_adapters()) - {name}
        while len(loaded) >= self._max_loaded:
            idle = [one for one, entry in self._entries.items() if one in loaded and entry.is_idle]
            # Then what other API processes loaded, whose use is unknown here.
            idle += sorted(loaded - self._entries.keys())
            if not idle:
                return
            self.forget(idle[0])
            loaded.discard(idle[0])
            await self._server.unload(idle[0])


def _nothing() -> None:
    """Release what needs no release."""


def _not_loaded(status: int, content: bytes) -> LuthierError:
    if status == 404:
        return LuthierError(
            "vLLM can't load adapters. An operator starts it with --enable-lora and "
            "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, and lets it read LUTHIER_VLLM_ADAPTERS_DIR."
        )
    try:
        reason = str(json.loads(content)["error"]["message"])[:200]
    except (ValueError, KeyError, TypeError):
        reason = f"HTTP {status}"
    return LuthierError(
        f"vLLM does not load this model: {reason} An operator reads its log; it refuses, among others, ranks "
        "above its --max-lora-rank."
    )


def open_backend(url: str, token: str, settings: Settings | None = None) -> VllmBackend:
    if settings is None:
        raise LuthierError("The backend vllm needs settings: it brings artifacts to vLLM's folder.")
    return VllmBackend(url, token, settings)
