"""One try at a delivery, with a resolver and a network of the test's own."""

import asyncio
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import Mock

import httpx2
import pytest

from luthier.webhooks import sending
from luthier.webhooks.events import Message, Outcome
from luthier.webhooks.sending import send
from luthier.webhooks.signing import new_secret
from luthier.webhooks.targets import TargetRules

_BODY = '{"say":"ü"}'.encode()
_PUBLIC = TargetRules()


class Names:
    """A name server that gives one answer after the other, and the last one for ever."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self.answers = list(answers)
        self.num_asked = 0

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.num_asked += 1
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def _send(
    url: str,
    names: Names,
    answer: Callable[[httpx2.Request], httpx2.Response],
    rules: TargetRules = _PUBLIC,
    timeout_seconds: float = 10.0,
) -> Outcome:
    message = Message("wh_1", url, _BODY, (new_secret(),))
    transport = httpx2.MockTransport(answer)
    return asyncio.run(
        send(message, rules, timeout_seconds=timeout_seconds, resolve=names, transport=transport)
    )


def test_the_address_that_was_checked_is_the_one_that_is_called():
    # A rebinding name server: public when it is checked, internal ever after.
    names = Names(["1.1.1.1"], ["127.0.0.1"])
    answer = Mock(return_value=httpx2.Response(204))
    assert _send("https://hooks.example:8443/a?b=c", names, answer) == Outcome(status_code=204)
    assert names.num_asked == 1
    (request,) = answer.call_args.args
    assert (request.url.host, request.url.port) == ("1.1.1.1", 8443)
    assert request.url.raw_path == b"/a?b=c"
    assert request.headers["host"] == "hooks.example:8443"
    assert request.extensions["sni_hostname"] == "hooks.example"
    assert request.read() == _BODY
    assert request.headers["content-type"] == "application/json"


def test_a_name_that_leads_inside_is_never_called():
    answer = Mock()
    for addresses in (["127.0.0.1"], ["1.1.1.1", "::1"], ["fe80::1%eth0"], ["::ffff:169.254.169.254"]):
        outcome = _send("https://hooks.example/", Names(addresses), answer)
        assert outcome.status_code is None
        assert outcome.error == sending.NO_PUBLIC_ADDRESS
    answer.assert_not_called()


def test_an_address_that_does_not_answer_is_followed_by_the_next():
    def answer(request: httpx2.Request) -> httpx2.Response:
        if request.url.host == "2606:4700:4700::1111":
            raise httpx2.ConnectError("no route")
        return httpx2.Response(200)

    names = Names(["2606:4700:4700::1111", "1.1.1.1"])
    assert _send("https://hooks.example/", names, answer).is_success


def test_only_a_2xx_is_a_success_and_a_redirect_is_not_followed():
    called: list[str] = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        called.append(str(request.url))
        return httpx2.Response(int(request.url.path[1:]), headers={"location": "http://127.0.0.1/secret"})

    for status in (200, 201, 204, 299, 301, 302, 307, 308, 400, 404, 410, 429, 500, 503):
        outcome = _send(f"https://hooks.example/{status}", Names(["1.1.1.1"]), answer)
        assert outcome.status_code == status
        assert outcome.is_success == (status < 300)
    assert all(url.startswith("https://1.1.1.1/") for url in called)
    assert len(called) == 14


def test_what_goes_wrong_on_the_way_is_an_outcome_in_our_own_words():
    async def unknown(host: str, port: int) -> Sequence[str]:
        raise socket.gaierror(-2, "Name or service not known")

    refuse = Mock(side_effect=httpx2.ConnectError("refused"))
    babble = Mock(side_effect=httpx2.RemoteProtocolError("secret words of the receiver"))
    for names, answer in ((unknown, refuse), (Names(["1.1.1.1"]), refuse), (Names(["1.1.1.1"]), babble)):
        outcome = _send("https://hooks.example/", names, answer)  # type: ignore[arg-type]
        assert outcome.status_code is None
        assert outcome.error
        assert "secret words" not in outcome.error
    assert _send("https://hooks.example/", Names([]), refuse).error


def test_a_resolver_or_receiver_that_never_answers_is_left_in_time():
    class Silent(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            await asyncio.Event().wait()
            raise AssertionError

    message = Message("wh_1", "https://hooks.example/", _BODY, (new_secret(),))
    outcome = asyncio.run(
        send(message, _PUBLIC, timeout_seconds=0.05, resolve=Names(["1.1.1.1"]), transport=Silent())
    )
    assert outcome == Outcome(error="no answer within 0.05 seconds")


def test_a_resolver_that_hangs_in_its_thread_is_left_in_time(monkeypatch):
    may_answer = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_kwargs: may_answer.wait(20) and [])
    message = Message("wh_1", "https://hooks.example/", _BODY, (new_secret(),))
    threads = set(threading.enumerate())

    async def send_and_end() -> Outcome:
        return await send(message, _PUBLIC, timeout_seconds=0.05)

    ended: list[Outcome] = []
    runner = threading.Thread(target=lambda: ended.append(asyncio.run(send_and_end())), daemon=True)
    runner.start()
    runner.join(timeout=15)
    is_over = not runner.is_alive()
    may_answer.set()
    assert is_over, "the loop waits for the resolver's thread"
    assert ended == [Outcome(error="no answer within 0.05 seconds")]
    for thread in set(threading.enumerate()) - threads:
        thread.join(timeout=15)


def test_names_beyond_the_bound_are_put_off(monkeypatch):
    monkeypatch.setattr(sending, "_asking", threading.BoundedSemaphore(1))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_args, **_kwargs: [(0, 0, 0, "", ("1.1.1.1", 443))])

    async def ask() -> Sequence[str]:
        return await sending.resolve_host("hooks.example", 443)

    assert asyncio.run(ask()) == asyncio.run(ask()) == ["1.1.1.1"]
    sending._asking.acquire()
    with pytest.raises(OSError, match="too many names"):
        asyncio.run(ask())


def _certificate(folder: Path, name: str) -> tuple[Path, Path]:
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    asked = f"req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={name}"
    named = ["-keyout", str(key), "-out", str(certificate), "-addext", f"subjectAltName=DNS:{name}"]
    subprocess.run(["openssl", *asked.split(), *named], check=True, capture_output=True)
    return key, certificate


@pytest.fixture
def tls_server(tmp_path: Path) -> "tuple[int, Path, list[str | None]]":
    """A TLS server with a certificate for hooks.example; the list holds the names that clients asked for."""
    key, certificate = _certificate(tmp_path, "hooks.example")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    asked: list[str | None] = []
    context.sni_callback = lambda _socket, name, _context: asked.append(name)
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            try:
                with context.wrap_socket(plain, server_side=True) as connection:
                    received = b""
                    # The body may arrive separately: closing with unread bytes would reset the connection.
                    while _BODY not in received and (more := connection.recv(65536)):
                        received += more
                    connection.sendall(b"HTTP/1.1 204 No Content\r\nconnection: close\r\n\r\n")
            except OSError:
                continue

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield listener.getsockname()[1], certificate, asked  # type: ignore[misc]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(timeout=5)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_tls_asks_for_the_names_certificate_at_the_checked_address(tls_server):
    port, certificate, asked = tls_server
    rules = TargetRules.parse(allow_http=False, allowed_targets="127.0.0.1")
    trusting = ssl.create_default_context(cafile=str(certificate))

    def call(host: str) -> Outcome:
        message = Message("wh_1", f"https://{host}:{port}/", _BODY, (new_secret(),))
        transport = httpx2.AsyncHTTPTransport(verify=trusting)
        names = Names(["127.0.0.1"])
        return asyncio.run(send(message, rules, timeout_seconds=20, resolve=names, transport=transport))

    assert call("hooks.example") == Outcome(status_code=204)
    assert call("other.example") == Outcome(error="its certificate could not be verified")
    assert asked == ["hooks.example", "other.example"]
