"""Sending of one delivery: the name is resolved once, checked, and the checked address is called.

No redirects, proxies or cookies; the answer's body is not read.
"""

import asyncio
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from functools import cache

import httpx2

from luthier.core.errors import InvalidValueError
from luthier.webhooks.events import Message, Outcome
from luthier.webhooks.signing import signed_headers
from luthier.webhooks.targets import TargetRules, check_url, host_of, permitted_addresses

_CONNECT_SECONDS = 5.0
# Addresses of a name that are tried; more would only take time.
_MAX_ADDRESSES = 3
# Names resolved at the same time, including those whose name servers hang for minutes.
_MAX_ASKING = 256
NO_PUBLIC_ADDRESS = "its name leads to no permitted address"
_asking = threading.BoundedSemaphore(_MAX_ASKING)

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


async def resolve_host(host: str, port: int) -> Sequence[str]:
    """Return a host's addresses in the resolver's order.

    It runs in a daemon thread: a name server that hangs would otherwise block the end of the event loop, or
    use up the shared thread pool.

    Raises:
        OSError: when the name can't be resolved, or too many are asked for already.
    """
    if not _asking.acquire(blocking=False):
        raise OSError("too many names are being resolved")
    answer: Future[list[str]] = Future()

    def ask() -> None:
        try:
            try:
                found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            finally:
                _asking.release()
            answer.set_result([str(entry[4][0]) for entry in found])
        except Exception as error:  # noqa: BLE001
            # Raised again where it is waited for.
            answer.set_exception(error)

    # Running from now on: it can't be cancelled, so that the thread can always set its result.
    answer.set_running_or_notify_cancel()
    try:
        threading.Thread(target=ask, daemon=True, name="resolver").start()
    except RuntimeError as error:
        _asking.release()
        raise OSError("no thread can be started") from error
    return await asyncio.wrap_future(answer)


@cache
def _tls() -> ssl.SSLContext:
    # Loading the authorities takes tens of milliseconds; once is enough.
    return httpx2.create_ssl_context()


async def send(
    message: Message,
    rules: TargetRules,
    *,
    timeout_seconds: float,
    resolve: Resolve = resolve_host,
    transport: httpx2.AsyncBaseTransport | None = None,
) -> Outcome:
    """Send a delivery once; a receiver that can't be reached or may not be called is an outcome too.

    `timeout_seconds` covers all of it, from the resolver to the answer's status.
    """
    try:
        async with asyncio.timeout(timeout_seconds):
            return await _send(message, rules, resolve, transport)
    except TimeoutError:
        return Outcome(error=f"no answer within {timeout_seconds:g} seconds")
    except InvalidValueError:
        # The same as for an unknown name: a tenant must not learn which internal names exist.
        return Outcome(error=NO_PUBLIC_ADDRESS)
    except (OSError, httpx2.HTTPError, httpx2.InvalidURL, UnicodeError) as error:
        return Outcome(error=_safe_text(error))


def _safe_text(error: BaseException) -> str:
    """Return fixed words for a failure: texts of receivers and libraries may hold anything."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return "its certificate could not be verified"
        if isinstance(cause, socket.gaierror):
            return NO_PUBLIC_ADDRESS
        cause = cause.__cause__ or cause.__context__
    return f"it could not be reached ({type(error).__name__})"


async def _send(
    message: Message, rules: TargetRules, resolve: Resolve, transport: httpx2.AsyncBaseTransport | None
) -> Outcome:
    url = check_url(message.url, rules)
    host = host_of(url)
    port = url.port or (443 if url.scheme == "https" else 80)
    addresses = permitted_addresses(host, await resolve(host, port), rules)
    headers = {
        "host": url.netloc.decode("ascii"),
        "content-type": "application/json",
        "user-agent": "Luthier-Webhooks/1.0",
        **signed_headers(
            message.secrets, webhook_id=message.webhook_id, timestamp=int(time.time()), body=message.body
        ),
    }
    async with httpx2.AsyncClient(
        transport=transport or httpx2.AsyncHTTPTransport(verify=_tls()),
        timeout=httpx2.Timeout(None, connect=_CONNECT_SECONDS),
        follow_redirects=False,
        trust_env=False,
    ) as client:
        failure: Exception = OSError("the name has no address")
        for address in addresses[:_MAX_ADDRESSES]:
            try:
                async with client.stream(
                    "POST",
                    # The address instead of the name, which is not resolved again.
                    url.copy_with(host=str(address)),
                    headers=headers,
                    content=message.body,
                    # TLS still asks for the name's certificate.
                    extensions={"sni_hostname": host},
                ) as response:
                    return Outcome(status_code=response.status_code)
            except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
                failure = error
    raise failure
