"""Clients of the API that leave, or do not read, before the real inference server."""

import json
import socket
from contextlib import closing
from urllib.parse import urlsplit

import httpx2
import pytest

from tests.conftest import Api, wait_until
from tests.inference_server import Served

SKY = [{"role": "user", "content": "the sky"}]


def connect(api: Api, path: str, body: dict[str, object]) -> socket.socket:
    """Send a request by hand, so that nothing is read that the test does not read."""
    parts = urlsplit(api.base_url)
    content = json.dumps({"model": "tiny-llama", "temperature": 0} | body)
    connection = socket.socket()
    connection.settimeout(60)
    # So that what is not read waits in the servers.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect((parts.hostname, parts.port))
    connection.sendall(
        f"POST {path} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {api.key}\r\nconnection: close\r\n"
        f"content-length: {len(content)}\r\n\r\n{content}".encode()
    )
    return connection


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_frees_its_sequence(chat_api: Api, served: Served, is_stream: bool) -> None:
    wait_until(lambda: not served.engine.has_work, "an idle engine")
    body = {"messages": SKY, "max_tokens": 200, "stream": is_stream}
    with closing(connect(chat_api, "/v1/chat/completions", body)) as connection:
        if is_stream:
            assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        else:
            wait_until(lambda: served.engine.num_running > 0, "the sequence's start")
        served.steps.gate.clear()
    try:
        wait_until(lambda: not served.service._open, "the server's notice")
        num_steps = served.steps.num_steps
    finally:
        served.steps.gate.set()
    wait_until(lambda: not served.engine.has_work, "the sequence's end")
    assert served.steps.num_steps <= num_steps + 2


def test_a_client_that_does_not_read_holds_up_no_other_and_gets_all_when_it_does(
    chat_api: Api, served: Served
) -> None:
    body = {"prompt": ["a"] * 48, "max_tokens": 200, "logprobs": 5, "stream": True}
    with closing(connect(chat_api, "/v1/completions", body)) as connection:
        wait_until(lambda: bool(served.service._open), "the stream's start")
        wait_until(lambda: not served.engine.has_work, "all tokens")
        answer = httpx2.post(
            f"{chat_api.base_url}/v1/chat/completions",
            headers=chat_api.headers,
            json={"model": "tiny-llama", "messages": SKY, "max_tokens": 2},
            timeout=30,
        )
        assert answer.status_code == 200
        received = b"".join(iter(lambda: connection.recv(65536), b""))
    assert received.count(b'"finish_reason":"') == 48
    assert received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
    wait_until(lambda: not served.service._open, "the stream's end")
