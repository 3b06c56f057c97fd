"""HTML pages: an index, and the API reference. They load nothing from other hosts."""

from importlib import resources
from typing import Annotated, Literal

from fastapi import APIRouter, Header
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, Response
from typing_extensions import TypedDict

router = APIRouter(tags=["pages"])

_SWAGGER_UI = resources.files("api.pages") / "swagger_ui"
_MEDIA_TYPES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
_PLACES = {
    "base_url": ("/v1", "the base URL of OpenAI's clients; ask with 'Authorization: Bearer KEY'"),
    "docs": ("/docs", "the reference"),
    "openapi": ("/openapi.json", "the same for programs"),
    "live": ("/healthz", "whether the process runs"),
    "ready": ("/readyz", "whether it can serve"),
    "metrics": ("/metrics", "for Prometheus, with an admin key or the metrics token"),
}
_WHAT = "Fine-tuning jobs as an API, in OpenAI's shapes, self-hosted."
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:40em;margin:3em auto;padding:0 1em}dt{margin-top:.6em}"
)


class ServiceObject(TypedDict):
    """What answers here, and where things are."""

    name: Literal["luthier"]
    what: str
    base_url: str
    docs: str
    openapi: str
    live: str
    ready: str
    metrics: str


@router.get("/", response_model=ServiceObject)
async def index(accept: Annotated[str, Header(include_in_schema=False)] = "") -> Response:
    """Say what this is and where things are: HTML for a browser, JSON for others."""
    if "text/html" not in accept:
        places = {name: path for name, (path, _) in _PLACES.items()}
        return JSONResponse({"name": "luthier", "what": _WHAT} | places)
    rows = "".join(f'<dt><a href="{path}">{path}</a><dd>{meaning}' for path, meaning in _PLACES.values())
    return HTMLResponse(
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Luthier</title><style>{_STYLE}</style>'
        f"<h1>Luthier</h1><p>{_WHAT}</p><dl>{rows}</dl>"
        "<p>Make a key on the server: <code>luthier keys create --name NAME</code></p></html>"
    )


@router.get("/docs", include_in_schema=False)
async def docs() -> HTMLResponse:
    """Show the reference by Swagger UI."""
    return get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="Luthier: reference",
        swagger_js_url="/docs/swagger-ui-bundle.js",
        swagger_css_url="/docs/swagger-ui.css",
        swagger_favicon_url="data:,",
    )


@router.get("/docs/{name}", include_in_schema=False)
def docs_file(name: Literal["swagger-ui-bundle.js", "swagger-ui.css"]) -> Response:
    """Send a file of Swagger UI, compressed as it is stored."""
    headers = {"content-encoding": "gzip", "cache-control": "public, max-age=86400"}
    content = (_SWAGGER_UI / f"{name}.gz").read_bytes()
    return Response(content, media_type=_MEDIA_TYPES[name], headers=headers)
