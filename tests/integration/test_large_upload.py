"""Uploads much larger than an API process may grow: refused or taken, its memory stays small."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx2
import openai
import pytest
from pydantic import SecretStr

from db.session import Database
from luthier.core.settings import Settings
from services.bootstrap import ensure_first_rows
from tests.conftest import wait_until
from tests.rows import chat_row, jsonl
from tests.stack import free_port
from tests.workers import environment_of

_MIB = 1024 * 1024
_MAX_GROWTH_BYTES = 64 * _MIB
_MAX_UPLOAD_BYTES = 256 * _MIB
_ROW = jsonl([chat_row("a question " * 400, "an answer")])


class ApiProcess:
    """A running API and its peak memory."""

    def __init__(self, base_url: str, key: str, pid: int) -> None:
        self.base_url, self.key, self._pid = base_url, key, pid
        self.client = openai.OpenAI(base_url=f"{base_url}/v1", api_key=key, max_retries=0)

    def peak_bytes(self) -> int:
        status = Path(f"/proc/{self._pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024


@pytest.fixture
def process(settings: Settings, database: Database, tmp_path: Path) -> Iterator[ApiProcess]:
    with database.transaction() as session:
        ensure_first_rows(session, settings)
    port = free_port()
    environment = environment_of(
        settings,
        redis_url=SecretStr("redis+socket:///nowhere"),
        inference_url=f"unix://{tmp_path}/none.sock",
        max_upload_bytes=_MAX_UPLOAD_BYTES,
    )
    with (tmp_path / "api.log").open("wb") as log:
        running = subprocess.Popen(
            [sys.executable, "-m", "api", "--port", str(port)], env=environment, stderr=log, stdout=log
        )
    base_url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        with suppress(httpx2.TransportError):
            return httpx2.get(f"{base_url}/readyz").status_code == 200
        return False

    try:
        wait_until(answers, what="the API is ready")
        yield ApiProcess(base_url, settings.bootstrap_api_key.get_secret_value(), running.pid)
    finally:
        running.terminate()
        running.wait(timeout=15)


def _form(num_bytes: int) -> Iterator[bytes]:
    yield b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
    block = _ROW * (_MIB // len(_ROW))
    for _ in range(num_bytes // len(block)):
        yield block
    yield b"\r\n--x--\r\n"


def _upload(process: ApiProcess, num_bytes: int, **headers: str) -> httpx2.Response:
    return httpx2.post(
        f"{process.base_url}/v1/files",
        content=_form(num_bytes),
        headers={
            "Authorization": f"Bearer {process.key}",
            "Content-Type": "multipart/form-data; boundary=x",
            **headers,
        },
        timeout=120,
    )


def _objects(settings: Settings) -> list[Path]:
    root = Path(settings.storage_url.removeprefix("file://"))
    return [path for path in root.rglob("*") if path.is_file()]


def test_a_refusal_has_openais_shape_and_takes_small_memory(process: ApiProcess, settings: Settings) -> None:
    _upload(process, 2 * _MIB)  # warm-up: what a first upload loads is not counted
    kept = _objects(settings)
    before = process.peak_bytes()
    undeclared = _upload(process, 2 * _MAX_UPLOAD_BYTES)
    length = sum(map(len, _form(2 * _MAX_UPLOAD_BYTES)))
    declared = _upload(process, 2 * _MAX_UPLOAD_BYTES, **{"Content-Length": str(length)})
    for answer in (undeclared, declared):
        assert answer.status_code == 413, answer.text
        assert answer.json()["error"]["code"] == "file_too_large"
        assert answer.headers["x-request-id"]
    assert process.peak_bytes() - before <= _MAX_GROWTH_BYTES
    assert _objects(settings) == kept


def test_an_upload_just_under_the_limit_is_taken_with_small_memory(process: ApiProcess) -> None:
    _upload(process, 2 * _MIB)
    before = process.peak_bytes()
    answer = _upload(process, 250 * _MIB)
    assert answer.status_code == 200, answer.text
    assert process.peak_bytes() - before <= _MAX_GROWTH_BYTES


def test_parts_are_taken_and_put_together_with_small_memory(process: ApiProcess) -> None:
    content = _ROW * (200 * _MIB // len(_ROW))

    def send(num_bytes: int) -> None:
        upload = process.client.uploads.upload_file_chunked(
            file=content[:num_bytes],
            filename="rows.jsonl",
            bytes=num_bytes,
            mime_type="text/jsonl",
            purpose="fine-tune",
        )
        assert upload.file is not None

    send(len(_ROW) * 100)
    before = process.peak_bytes()
    send(len(content))
    assert process.peak_bytes() - before <= _MAX_GROWTH_BYTES


def test_the_sdk_sees_the_refusal_and_not_a_broken_connection(process: ApiProcess) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        process.client.files.create(file=("big.jsonl", _ROW * (300 * _MIB // len(_ROW))), purpose="fine-tune")
    assert caught.value.status_code == 413
