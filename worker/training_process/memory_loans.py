"""Memory that an inference server of this machine lends to a job: idle blocks of its KV cache.

The server has no database: a loan that is not repeated lapses there. It is made by one call, for a job that
would have to wait otherwise, kept while the job runs, and given back when its process is gone.
"""

import secrets
import threading

import httpx2
import structlog
from pydantic import ValidationError

from luthier.core.devices import Device
from luthier.core.inference import HEADER_TOKEN, LOANS_PATH, LoanRequest, MemoryLoan
from services.capacity.memory import Waiting
from worker.context import WorkerContext

_log = structlog.get_logger()

_CONNECT_SECONDS = 1.0
# Giving back waits for the step that runs.
_READ_SECONDS = 5.0
_LOCAL_ORIGIN = "http://inference"
# In leases: how long a loan is kept that its worker is slow to repeat.
_LEASES = 4


class Loan:
    """A loan of one server, repeated in a thread until it is ended."""

    def __init__(self, context: WorkerContext, url: str, job_id: str, request: LoanRequest) -> None:
        self._context, self._url, self._request = context, url, request
        self.job_id, self.num_bytes = job_id, request.num_bytes
        self._is_ended = threading.Event()
        self._keeping = threading.Thread(target=self._keep, daemon=True)
        self._keeping.start()

    def end(self) -> None:
        """Give it back."""
        self._is_ended.set()
        self._keeping.join()
        _ask(self._context, self._url, self._request.model_copy(update={"num_bytes": 0, "least_bytes": 0}))

    def _keep(self) -> None:
        while not self._is_ended.wait(self._context.settings.heartbeat_seconds):
            _ask(self._context, self._url, self._request)


def borrow(context: WorkerContext, device: Device, waiting: Waiting) -> Loan | None:
    """Ask the inference servers of this device for what a job lacks; None where none lends enough of it."""
    for url in context.settings.inference_urls:
        request = LoanRequest(
            # A Unix socket leads to this machine; over TCP it may be another.
            hostname=None if url.startswith("unix://") else device.hostname,
            device=device.name,
            # Another worker may ask for the same job.
            loan_id=f"{waiting.job_id}-{secrets.token_hex(4)}",
            num_bytes=waiting.missing_bytes,
            least_bytes=waiting.least_bytes,
            seconds=_LEASES * context.settings.lease_seconds,
        )
        lent_bytes = _ask(context, url, request)
        if lent_bytes:
            kept = request.model_copy(update={"num_bytes": lent_bytes, "least_bytes": 0})
            return Loan(context, url, waiting.job_id, kept)
    return None


def _ask(context: WorkerContext, url: str, request: LoanRequest) -> int:
    """Return the bytes that a server lends; none where it can't be asked."""
    is_local = url.startswith("unix://")
    token = context.settings.internal_token.get_secret_value()
    try:
        with httpx2.Client(
            transport=httpx2.HTTPTransport(uds=url.removeprefix("unix://") if is_local else None),
            base_url=_LOCAL_ORIGIN if is_local else url,
            headers={} if is_local else {HEADER_TOKEN: token},
            timeout=httpx2.Timeout(_READ_SECONDS, connect=_CONNECT_SECONDS),
        ) as client:
            answer = client.post(LOANS_PATH, json=request.model_dump()).raise_for_status()
            return MemoryLoan.model_validate_json(answer.content).lent_bytes
    except (httpx2.HTTPError, ValidationError) as error:
        # Not started, or just restarting, or of another make: it lends nothing.
        _log.debug("no memory can be borrowed", url=url, reason=type(error).__name__)
        return 0
