"""Large files are checked beside the API: by processes that end with their upload, few a project."""

import http.client
import os
import resource
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import openai

from tests.conftest import Api, wait_until
from tests.rows import chat_row, jsonl

_OWN_PID = os.getpid()
MIB = 1024 * 1024
HEAD = (
    b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
)
ROWS = jsonl([chat_row("a question " * 40, "an answer")]) * 8000


def _seconds(who: int) -> float:
    usage = resource.getrusage(who)
    return usage.ru_utime + usage.ru_stime


def _checking() -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().split(b"\0")
            parent = (path.parent / "stat").read_text().rsplit(")", 1)[1].split()[1]
        except OSError:
            continue
        if b"luthier.data.readers.check_process" in command and int(parent) == _OWN_PID:
            found.append(path.parent.name)
    return found


@contextmanager
def _begun(api: Api) -> Iterator[http.client.HTTPConnection]:
    """Hold an upload of which more than a MiB came, and whose end does not come."""
    connection = _connect(api, 100 * MIB, HEAD + ROWS)
    try:
        yield connection
    finally:
        connection.close()


def _connect(api: Api, num_bytes: int, begin: bytes) -> http.client.HTTPConnection:
    """Begin an upload of a declared length."""
    address = urlsplit(api.base_url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    connection.putrequest("POST", "/v1/files")
    for name, value in api.headers.items():
        connection.putheader(name, value)
    connection.putheader("Content-Type", "multipart/form-data; boundary=x")
    connection.putheader("Content-Length", str(num_bytes))
    connection.endheaders(begin)
    return connection


def test_small_rows_are_checked_outside_of_the_process_that_answers(api: Api) -> None:
    before = _seconds(resource.RUSAGE_SELF), _seconds(resource.RUSAGE_CHILDREN)
    answer = api.upload(b'{"text":"a"}\n' * (16 * MIB // 13))
    here = _seconds(resource.RUSAGE_SELF) - before[0]
    there = _seconds(resource.RUSAGE_CHILDREN) - before[1]
    assert answer.status_code == 200, answer.text
    # All that the API does for 16 MiB, this client's part included.
    assert here < there


def test_a_third_large_upload_of_a_project_is_refused_until_one_is_done(api: Api) -> None:
    with _begun(api), _begun(api) as second:
        wait_until(lambda: len(_checking()) == 2, what="two files are checked")
        refused = api.upload(ROWS)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (429, "rate_limit_exceeded")
        assert refused.headers["retry-after"]
        assert error["message"].startswith("This project has 2 large files being checked, and the limit is 2")
        assert api.upload(ROWS[: len(ROWS) // 100]).status_code == 200
        second.close()
        wait_until(lambda: len(_checking()) == 1, what="one file is checked")
        assert api.upload(ROWS).status_code == 200


def test_a_client_that_leaves_during_an_upload_leaves_nothing(api: Api, client: openai.OpenAI) -> None:
    with _begun(api):
        wait_until(lambda: _checking() and api.stored_objects(), what="bytes are checked and written")
    wait_until(lambda: not _checking() and not api.stored_objects(), what="nothing is left")
    assert client.files.list().data == []
    # Nor are places: as many as there may be are free again.
    with _begun(api), _begun(api):
        wait_until(lambda: len(_checking()) == 2, what="two files are checked")


def test_who_stops_sending_a_refused_upload_is_answered_within_seconds(api: Api) -> None:
    with closing(_connect(api, 2**40, HEAD)) as connection:
        began = time.monotonic()
        assert connection.getresponse().status == 413
        assert time.monotonic() - began < 30
