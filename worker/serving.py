"""The inference server of this machine in the ledger of memory: asked what it holds, told what it may take.

The server has no database, so its worker keeps its row. Where none answers here, nothing is held for it.
"""

import httpx2
import structlog
from pydantic import ValidationError

from luthier.core.devices import Device
from luthier.core.inference import HEADER_TOKEN, MEMORY_PATH, MemoryOrder, MemoryState
from services import serving
from worker.context import WorkerContext

_log = structlog.get_logger()

_CONNECT_SECONDS = 1.0
# Giving back waits for the step that runs.
_READ_SECONDS = 5.0
_LOCAL_ORIGIN = "http://inference"


def look_once(context: WorkerContext) -> None:
    """See what serving holds before this process claims its first job; the sweep goes on with it."""
    if not context.has_looked_at_serving:
        context.has_looked_at_serving = True
        balance(context)


def balance(context: WorkerContext) -> None:
    """Let serving have what jobs leave, and give back what a waiting job needs, as far as it can."""
    if context.device is None:
        return
    for url in context.settings.inference_urls:
        try:
            with _open(url, context.settings.internal_token.get_secret_value()) as client:
                _balance(context, context.device, url, client)
        except (httpx2.HTTPStatusError, ValidationError) as error:
            _log.warning("serving does not tell its memory", reason=type(error).__name__)
        except httpx2.HTTPError as error:
            # Not started, or just restarting: its row lapses by itself.
            _log.debug("serving's memory is not known", reason=type(error).__name__)


def _balance(context: WorkerContext, device: Device, url: str, client: httpx2.Client) -> None:
    state = _ask(client, None)
    # Over TCP it may be another machine's, or serve on another device of this one.
    is_here = url.startswith("unix://") or state.hostname == device.hostname
    if not is_here or state.device != device.name:
        return
    lease_seconds, before = context.settings.lease_seconds, context.serving_ids.get(url, state.server_id)
    with context.database.transaction() as session:
        if before != state.server_id:
            serving.forget(session, device, before)
        order = serving.plan(session, device, state, lease_seconds=lease_seconds)
    context.serving_ids[url] = state.server_id
    agreed = _ask(client, order)
    with context.database.transaction() as session:
        serving.confirm(session, device, agreed, order)


def _open(url: str, token: str) -> httpx2.Client:
    is_local = url.startswith("unix://")
    return httpx2.Client(
        transport=httpx2.HTTPTransport(uds=url.removeprefix("unix://") if is_local else None),
        base_url=_LOCAL_ORIGIN if is_local else url,
        headers={} if is_local else {HEADER_TOKEN: token},
        timeout=httpx2.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS),
    )


def _ask(client: httpx2.Client, order: MemoryOrder | None) -> MemoryState:
    method, body = ("GET", None) if order is None else ("POST", order.model_dump())
    answer = client.request(method, MEMORY_PATH, json=body)
    return MemoryState.model_validate_json(answer.raise_for_status().content)
