"""Plain HTTP requests and what they store, for tests of the API without an SDK."""

from typing import Any

import httpx2

from tests.conftest import Api


def ask(api: Api, method: str, path: str, **options: Any) -> httpx2.Response:
    """Send a request with the key; `path` is what follows /v1."""
    headers = api.headers | options.pop("headers", {})
    return httpx2.request(method, f"{api.base_url}/v1{path}", headers=headers, **options)


def create_job(api: Api, file_id: str, **body: Any) -> dict[str, Any]:
    """Create a job and return it."""
    plain = {"model": "tiny-llama", "training_file": file_id}
    answer = ask(api, "POST", "/fine_tuning/jobs", json=plain | body)
    assert answer.status_code == 200, answer.text
    made: dict[str, Any] = answer.json()
    return made


def upload(api: Api, content: bytes, name: str = "rows.jsonl", **options: Any) -> httpx2.Response:
    """Upload a training file."""
    form = {"purpose": (None, "fine-tune"), "file": (name, content)}
    return ask(api, "POST", "/files", files=form, **options)


def stored_objects(api: Api) -> list[str]:
    """Return the names of all objects in storage, without their prefixes, sorted."""
    root = api.state.storage.local_root
    assert root is not None
    return sorted(path.name for path in root.rglob("*") if path.is_file())
