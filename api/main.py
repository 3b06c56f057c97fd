"""The FastAPI application and the state of its process."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import anyio.to_thread
from fastapi import Depends, FastAPI, Security
from starlette.middleware.cors import CORSMiddleware

from api import errors
from api.deps import MAX_DATABASE_REQUESTS, AppState, bearer_scheme
from api.metrics import ApiMetrics, UsageRecorder
from api.middleware import (
    BodyLimitMiddleware,
    EncodedSlashMiddleware,
    RequestLogMiddleware,
    refuse_unknown_query,
)
from api.routes import (
    aliases,
    chat,
    files,
    health,
    jobs,
    keys,
    methods,
    metrics,
    models,
    pages,
    permissions,
    uploads,
    usage,
    webhooks,
)
from api.streaming.event_hub import EventHub
from db.session import Database
from luthier.bases.catalogue import load_catalogue
from luthier.core.settings import Settings
from luthier.serving import open_all
from luthier.storage.store import Storage
from luthier.webhooks.sealing import Sealer
from services.task_queue import TaskNotifier, make_celery

# Connections of requests that hold one throughout, and a few for those that use one briefly in a thread.
_POOL_SIZE = MAX_DATABASE_REQUESTS + 8
# More threads than connections: those that move bytes hold none.
_NUM_THREADS = _POOL_SIZE + 16
# Headers that scripts in browsers may read.
_EXPOSED_HEADERS = (
    "x-request-id",
    "retry-after",
    "x-should-retry",
    "x-luthier-digest",
    "x-luthier-model",
    "etag",
    "content-range",
)


def make_app_state(settings: Settings) -> AppState:
    """Return the state of one API process; nothing is connected yet."""
    database_url = settings.database_url.get_secret_value()
    database, catalogue = Database(database_url, pool_size=_POOL_SIZE), load_catalogue(settings.models_file)
    return AppState(
        settings=settings,
        database=database,
        storage=Storage.open(settings.storage_url),
        catalogue=catalogue,
        usage=UsageRecorder(database),
        metrics=ApiMetrics(database, lease_seconds=settings.lease_seconds),
        backend=open_all(settings),
        hub=EventHub(database_url),
        sealer=Sealer(settings.secret_key.get_secret_value()),
        notify=TaskNotifier(make_celery(settings.redis_url.get_secret_value())).notify,
    )


def _lifespan(state: AppState) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def run(_app: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = _NUM_THREADS
        state.hub.start()
        state.usage.start()
        yield
        await state.hub.stop()
        await state.usage.stop()
        await state.backend.aclose()
        state.database.close()

    return run


def create_app(state: AppState) -> FastAPI:
    app = FastAPI(
        title="Luthier",
        description="Fine-tuning jobs as an API, in OpenAI's shapes.",
        version="0.1.0",
        lifespan=_lifespan(state),
        # A redirect would turn a POST into a GET in some clients.
        redirect_slashes=False,
        # Instead of the 422 that FastAPI documents and this service never sends.
        responses={"default": {"model": errors.ErrorBody, "description": "Refused or failed"}},
        servers=[{"url": "/", "description": "The service that this document comes from"}],
        # FastAPI's page loads scripts from other hosts: api/routes/pages.py has one that does not.
        docs_url=None,
        redoc_url=None,
    )
    app.state.shared = state
    app.state.readiness = health.Readiness(state)
    errors.install(app)
    app.add_middleware(EncodedSlashMiddleware)
    app.add_middleware(BodyLimitMiddleware)
    origins = [origin.strip() for origin in state.settings.cors_origins.split(",") if origin.strip()]
    app.add_middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["*"],
        allow_headers=["*"],
        expose_headers=_EXPOSED_HEADERS,
    )
    is_logged = state.settings.log_level in {"debug", "info"}
    app.add_middleware(RequestLogMiddleware, metrics=state.metrics, usage=state.usage, is_logged=is_logged)
    # Routes are matched in order: the most frequent first. Clients of chats and models add parameters of
    # their own.
    for module in (health, pages):
        app.include_router(module.router)
    for module in (metrics, chat, models):
        app.include_router(module.router, dependencies=[Security(bearer_scheme)])
    for module in (
        files,
        uploads,
        jobs,
        methods,
        keys,
        permissions,
        webhooks,
        aliases,
        usage,
    ):
        app.include_router(
            module.router, dependencies=[Depends(refuse_unknown_query), Security(bearer_scheme)]
        )
    return app
