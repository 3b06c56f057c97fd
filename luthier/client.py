"""What the OpenAI SDK lacks, over HTTP: keys, aliases, live events, model files. Nothing that the SDK already
has, but for the few reads that the command line needs without it.
"""

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import httpx2

from luthier.core.errors import ArtifactCorruptError, InvalidValueError, LuthierError

_CHUNK_BYTES = 256 * 1024
_TIMEOUT = httpx2.Timeout(60.0, connect=5.0)
# The rows of a large file are checked before the answer, for as long as that takes.
_UPLOAD_TIMEOUT = httpx2.Timeout(60.0, connect=5.0, read=None)
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 5.0
_MAX_LOSSES_IN_A_ROW = 20

# Bytes done and bytes in all, of one file.
OnProgress = Callable[[str, int, int], None]


class ApiError(LuthierError):
    """An answer of the service that is an error; message, code and param are the service's own."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None
    ) -> None:
        super().__init__(message, param=param)
        self.status = status
        self.error_code = code


class NotRunningError(LuthierError):
    """Nothing answers at the base URL."""

    code = "not_running"


class LuthierClient(AbstractContextManager["LuthierClient"]):
    """A connection to one service.

    Args:
        base_url: as printed by `luthier up`, ending in /v1.
        sleep: waits between attempts to reconnect, in seconds.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str,
        *,
        transport: httpx2.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        self._sleep = sleep
        self._http = httpx2.Client(
            headers={"Authorization": f"Bearer {api_key}"}, timeout=_TIMEOUT, transport=transport
        )

    def __exit__(self, *_: object) -> None:
        self._http.close()

    # ---- keys

    def create_key(self, name: str, *, project: str | None = None) -> dict[str, Any]:
        """Make a key in a project, made when new, or in the caller's; `key` of the answer is shown once."""
        body = {"name": name} if project is None else {"name": name, "project": project}
        return self._ask("POST", "/keys", body=body)

    def list_keys(self) -> list[dict[str, Any]]:
        """Return all keys of the installation, without the secret part."""
        return self._data("/keys")

    def revoke_key(self, key_id: str) -> None:
        self._ask("DELETE", f"/keys/{quote(key_id, safe='')}")

    # ---- usage

    def list_usage(self, *, start_time: int, group_by: Sequence[str] = ()) -> list[dict[str, Any]]:
        """Return the usage of inference since then, in Unix seconds, a bucket for each day (UTC).

        `group_by` is of `project_id`, `api_key_id` and `model`.
        """
        buckets: list[dict[str, Any]] = []
        page: str | None = ""
        while page is not None:
            query = [
                ("start_time", str(start_time)),
                ("limit", "31"),
                *(("group_by", name) for name in group_by),
            ]
            query += [("page", page)] if page else []
            answer = self._ask("GET", f"/organization/usage/completions?{urlencode(query)}")
            buckets += answer["data"]
            page = answer["next_page"]
        return buckets

    # ---- files

    def upload_file(self, path: Path, *, purpose: str) -> dict[str, Any]:
        """Upload a file and return its object; it is read while it is sent.

        Raises:
            InvalidValueError: when it can't be read.
            ApiError: when the service refuses it; the message names each broken line.
        """
        try:
            with path.open("rb") as stream:
                files = {"purpose": (None, purpose), "file": (path.name, stream, "application/octet-stream")}
                return self._ask("POST", "/files", files=files)
        except OSError as error:
            raise InvalidValueError(f"{path} can't be read: {error.strerror}.", param="file") from error

    def list_files(self) -> list[dict[str, Any]]:
        """Return all files of the project, newest first."""
        return self._all("/files")

    def delete_file(self, file_id: str) -> None:
        self._ask("DELETE", f"/files/{quote(file_id, safe='')}")

    # ---- answers

    def stream_chat(self, body: dict[str, Any]) -> Iterator[str]:
        """Yield the pieces of a chat's answer as they come; `body` is that of POST …/chat/completions.

        Raises:
            ApiError: when the service refuses, or the answer breaks off.
            NotRunningError: when the connection is lost.
        """
        url = f"{self.base_url}/chat/completions"
        try:
            with self._http.stream("POST", url, json={**body, "stream": True}) as response:
                _check(response)
                for item in httpx2.EventSource(response):
                    if item.data == "[DONE]":
                        return
                    chunk = json.loads(item.data)
                    if "error" in chunk:
                        raise ApiError(response.status_code, str(chunk["error"]["message"]))
                    for choice in chunk["choices"]:
                        yield choice["delta"].get("content") or ""
        except httpx2.TransportError as error:
            raise NotRunningError(
                f"The connection to {self.base_url} was lost ({type(error).__name__})."
            ) from error
        raise NotRunningError("The answer broke off: its stream ended without [DONE].")

    # ---- jobs and models

    def create_job(self, body: dict[str, Any]) -> dict[str, Any]:
        return self._ask("POST", "/fine_tuning/jobs", body=body)

    def list_checkpoints(self, job_id: str) -> list[dict[str, Any]]:
        """Return all checkpoints of a job, highest step first."""
        return self._all(f"/fine_tuning/jobs/{quote(job_id, safe='')}/checkpoints")

    def list_jobs(self, *, limit: int = 20) -> list[dict[str, Any]]:
        return self._data("/fine_tuning/jobs", {"limit": str(limit)})

    def get_job(self, job_id: str) -> dict[str, Any]:
        return self._ask("GET", f"/fine_tuning/jobs/{quote(job_id, safe='')}")

    def cancel_job(self, job_id: str) -> dict[str, Any]:
        return self._ask("POST", f"/fine_tuning/jobs/{quote(job_id, safe='')}/cancel")

    def pause_job(self, job_id: str) -> dict[str, Any]:
        """Pause a job and return it: `paused`, or `pausing` until its worker has stored a save point."""
        return self._ask("POST", f"/fine_tuning/jobs/{quote(job_id, safe='')}/pause")

    def resume_job(self, job_id: str) -> dict[str, Any]:
        return self._ask("POST", f"/fine_tuning/jobs/{quote(job_id, safe='')}/resume")

    def estimate_job(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return what the job of a create's body would take: rows, tokens, steps, resolved parameters.

        Seconds and memory are there once a worker has measured the base.
        """
        return self._ask("POST", "/fine_tuning/jobs/estimate", body=body)

    def get_report(self, job_id: str) -> dict[str, Any]:
        """Return what a job's files held and what its training did; parts that aren't there yet are None."""
        return self._ask("GET", f"/fine_tuning/jobs/{quote(job_id, safe='')}/report")

    def list_methods(self) -> list[dict[str, Any]]:
        """Return the ways to tune, each with the JSON schema of a job's `tuning`."""
        return self._data("/fine_tuning/methods")

    def is_inference_ready(self) -> bool:
        """Whether one inference server at least can answer, as the API finds it."""
        answer = self._ask("GET", "/readyz", root=self.base_url.removesuffix("/v1"))
        return bool(answer.get("inference") == "ready")

    def list_models(self) -> list[dict[str, Any]]:
        """Return all models that the key may call."""
        return self._data("/models")

    def pin_model(self, name: str, *, is_pinned: bool = True) -> dict[str, Any]:
        """Let servers keep a tuned model in memory from its next request on, or no longer; return it."""
        return self._ask("PUT" if is_pinned else "DELETE", f"/models/{quote(name, safe='')}/pin")

    def delete_model(self, name: str) -> None:
        self._ask("DELETE", f"/models/{quote(name, safe='')}")

    # ---- aliases

    def put_alias(self, name: str, model: str) -> dict[str, Any]:
        """Point an alias to a model, make it when it is new, and return it."""
        return self._ask("PUT", _alias(name), body={"model": model})

    def list_aliases(self) -> list[dict[str, Any]]:
        """Return all aliases of the project, newest first."""
        return self._all("/aliases")

    def list_alias_versions(self, name: str) -> list[dict[str, Any]]:
        """Return all that an alias has pointed to, newest first."""
        return self._all(f"{_alias(name)}/versions")

    def roll_back_alias(self, name: str, *, version: int | None = None) -> dict[str, Any]:
        """Point an alias to what a version did, the one before when None, and return it."""
        body = {} if version is None else {"version": version}
        return self._ask("POST", f"{_alias(name)}/rollback", body=body)

    def delete_alias(self, name: str) -> None:
        """Forget an alias; the model that it points to stays."""
        self._ask("DELETE", _alias(name))

    # ---- live events

    def follow_events(self, job_id: str, *, last_event_id: str = "") -> Iterator[dict[str, Any]]:
        """Yield a job's events, as of GET …/events, old ones first, then live ones until the job ends.

        A lost connection is made again from the event after the last one seen, so none is missed or doubled.

        Raises:
            ApiError: when the service refuses.
            NotRunningError: when nothing has answered for about a minute and a half.
        """
        path = f"{self.base_url}/fine_tuning/jobs/{quote(job_id, safe='')}/events"
        num_losses = 0
        while True:
            headers = {"Accept": "text/event-stream"}
            if last_event_id:
                headers["Last-Event-ID"] = last_event_id
            try:
                with self._http.stream("GET", path, params={"stream": "true"}, headers=headers) as response:
                    _check(response)
                    for item in httpx2.EventSource(response):
                        if item.event == "error":
                            # The service is shutting down.
                            break
                        num_losses = 0
                        if item.data == "[DONE]":
                            return
                        last_event_id = item.id or last_event_id
                        if item.data:
                            yield json.loads(item.data)
            except httpx2.TransportError as error:
                num_losses = self._after_loss(num_losses, error)
            except ApiError as error:
                # A service that starts again answers 503 for a moment.
                if error.status < 500:
                    raise
                num_losses = self._after_loss(num_losses, error)
            else:
                # The stream ended before the job: the service is shutting down.
                num_losses = self._after_loss(num_losses, None)

    def _after_loss(self, num_losses: int, error: Exception | None) -> int:
        if num_losses >= _MAX_LOSSES_IN_A_ROW:
            raise NotRunningError(f"{self.base_url} does not answer any more.") from error
        self._sleep(min(_FIRST_PAUSE_SECONDS * 2**num_losses, _LONGEST_PAUSE_SECONDS))
        return num_losses + 1

    # ---- model files

    def list_model_files(self, model: str) -> list[dict[str, Any]]:
        """Return name, bytes and sha256 of each file of a tuned model."""
        return self._data(f"/models/{quote(model, safe='')}/files")

    def download_model(
        self, model: str, folder: Path, *, on_progress: OnProgress | None = None
    ) -> list[Path]:
        """Download every file of a tuned model, verified; what is there already is not fetched again.

        `on_progress` is called with a file's name, bytes done and bytes in all.

        Raises:
            ApiError: when the service refuses.
            ArtifactCorruptError: when a file does not match its sha256 even when fetched anew.
        """
        entries = self.list_model_files(model)
        folder.mkdir(parents=True, exist_ok=True)
        paths = []
        for entry in entries:
            path = (folder / entry["name"]).resolve()
            if not path.is_relative_to(folder.resolve()):
                raise ArtifactCorruptError(
                    f"The service names a file outside the folder: {entry['name'][:40]!r}"
                )
            url = f"{self.base_url}/models/{quote(model, safe='')}/files/{quote(entry['name'])}"
            self._download(url, path, entry, on_progress)
            paths.append(path)
        return paths

    def _download(self, url: str, path: Path, entry: dict[str, Any], on_progress: OnProgress | None) -> None:
        if path.is_file() and _sha256(path) == entry["sha256"]:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        for _ in range(2):
            self._fetch_rest(url, part, entry, on_progress)
            if _sha256(part) == entry["sha256"]:
                part.replace(path)
                return
            # What an earlier try left may be of another version: the second try begins at nothing.
            part.unlink()
        raise ArtifactCorruptError(f"{entry['name']} does not match its sha256; download it again later.")

    def _fetch_rest(
        self, url: str, part: Path, entry: dict[str, Any], on_progress: OnProgress | None
    ) -> None:
        num_done = part.stat().st_size if part.exists() else 0
        if num_done >= entry["bytes"] > 0:
            num_done = 0
        headers = {"Range": f"bytes={num_done}-"} if num_done else {}
        try:
            with self._http.stream("GET", url, headers=headers) as response:
                _check(response)
                is_rest = response.status_code == 206
                num_done = num_done if is_rest else 0
                with part.open("ab" if is_rest else "wb") as target:
                    for chunk in response.iter_bytes(_CHUNK_BYTES):
                        target.write(chunk)
                        num_done += len(chunk)
                        if on_progress is not None:
                            on_progress(entry["name"], num_done, entry["bytes"])
        except httpx2.TransportError as error:
            raise NotRunningError(
                f"The connection was lost in {entry['name']}; the same command continues from there."
            ) from error

    # ---- plumbing

    def _data(self, path: str, params: dict[str, str] | None = None) -> list[dict[str, Any]]:
        data: list[dict[str, Any]] = self._ask("GET", path, params=params)["data"]
        return data

    def _all(self, path: str) -> list[dict[str, Any]]:
        """Return a list from its first page to its last."""
        found: list[dict[str, Any]] = []
        params = {"limit": "100"}
        while True:
            page = self._ask("GET", path, params=params)
            found += page["data"]
            if not page["has_more"]:
                return found
            params["after"] = page["last_id"]

    def _ask(
        self,
        method: str,
        path: str,
        *,
        params: dict[str, str] | None = None,
        body: dict[str, Any] | None = None,
        files: dict[str, Any] | None = None,
        root: str | None = None,
    ) -> dict[str, Any]:
        try:
            url = (self.base_url if root is None else root) + path
            timeout = _TIMEOUT if files is None else _UPLOAD_TIMEOUT
            response = self._http.request(method, url, params=params, json=body, files=files, timeout=timeout)
        except httpx2.TransportError as error:
            raise NotRunningError(
                f"Nothing answers at {self.base_url} ({type(error).__name__}). Start it with `luthier up`, "
                "or name another service by --base-url."
            ) from error
        _check(response)
        answer: dict[str, Any] = response.json() if response.content else {}
        return answer


def _alias(name: str) -> str:
    return f"/aliases/{quote(name, safe='')}"


def _check(response: httpx2.Response) -> None:
    if response.status_code < 400:
        return
    response.read()
    try:
        error = response.json()["error"]
        message, code, param = str(error["message"]), error.get("code"), error.get("param")
    except (ValueError, KeyError, TypeError):
        message, code, param = f"The service answered {response.status_code}.", None, None
    raise ApiError(response.status_code, message, code=code, param=param)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
