"""The client against a service that misbehaves on purpose."""

import hashlib
import json
from collections.abc import Callable

import httpx2
import pytest

from luthier.client import ApiError, LuthierClient, NotRunningError
from luthier.core.errors import ArtifactCorruptError

_CONTENT = bytes(range(256)) * 40


def _client(answer: Callable[[httpx2.Request], httpx2.Response]) -> LuthierClient:
    return LuthierClient(
        "http://service/v1", "lt_key", transport=httpx2.MockTransport(answer), sleep=lambda _seconds: None
    )


def _stream(*items: tuple[str, str], end: str = "") -> httpx2.Response:
    body = "".join(f"id: {id_}\ndata: {data}\n\n" for id_, data in items) + end
    return httpx2.Response(200, content=body.encode(), headers={"content-type": "text/event-stream"})


def _refusal(status: int) -> httpx2.Response:
    error = {"message": "No such job", "type": "x", "param": "id", "code": "not_found"}
    return httpx2.Response(status, json={"error": error})


def test_the_key_is_sent_and_an_error_keeps_its_code():
    def answer(request: httpx2.Request) -> httpx2.Response:
        assert request.headers["authorization"] == "Bearer lt_key"
        return _refusal(404)

    with pytest.raises(ApiError, match="No such job") as caught:
        _client(answer).get_job("ftjob-1")
    assert (caught.value.status, caught.value.error_code, caught.value.param) == (404, "not_found", "id")


def test_the_answer_to_an_upload_is_awaited_for_as_long_as_its_rows_are_checked(tmp_path):
    def answer(request: httpx2.Request) -> httpx2.Response:
        request.read()
        assert request.extensions["timeout"]["read"] is None
        assert request.extensions["timeout"]["write"] == 60
        return httpx2.Response(200, json={"id": "file-1"})

    path = tmp_path / "rows.jsonl"
    path.write_bytes(_CONTENT)
    assert _client(answer).upload_file(path, purpose="fine-tune") == {"id": "file-1"}


def test_an_error_page_that_is_no_json_is_still_an_error():
    with pytest.raises(ApiError, match="502"):
        _client(lambda _: httpx2.Response(502, content=b"<html>")).list_jobs()


def test_a_service_that_is_not_there_is_said_with_what_to_do():
    def answer(_request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("refused")

    with pytest.raises(NotRunningError, match="luthier up"):
        _client(answer).list_keys()


def test_ids_are_quoted_so_that_they_stay_one_part_of_the_path():
    paths = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        paths.append(request.url.raw_path)
        return httpx2.Response(200, json={"data": []})

    client = _client(answer)
    client.list_model_files("ft:base:org:a/b:id")
    client.revoke_key("../jobs")
    client.get_report("a/b")
    assert client.list_methods() == []
    assert paths == [
        b"/v1/models/ft%3Abase%3Aorg%3Aa%2Fb%3Aid/files",
        b"/v1/keys/..%2Fjobs",
        b"/v1/fine_tuning/jobs/a%2Fb/report",
        b"/v1/fine_tuning/methods",
    ]


def test_events_continue_after_a_lost_connection_without_a_gap_or_a_repeat():
    asked_from = []

    def answer(request: httpx2.Request) -> httpx2.Response:
        last = request.headers.get("last-event-id", "")
        asked_from.append(last)
        if len(asked_from) == 2:
            raise httpx2.ReadError("cut")
        if len(asked_from) == 3:
            return _refusal(503)
        if last == "":
            shutdown = 'event: error\ndata: {"error": {"code": "service_unavailable"}}\n\n'
            return _stream(("1", '{"n": 1}'), ("2", '{"n": 2}'), end=shutdown)
        return _stream(("3", '{"n": 3}'), ("4", "[DONE]"))

    events = list(_client(answer).follow_events("ftjob-1"))
    assert [event["n"] for event in events] == [1, 2, 3]
    assert asked_from == ["", "2", "2", "2"]


def test_events_of_an_unknown_job_are_refused_at_once():
    with pytest.raises(ApiError):
        list(_client(lambda _: _refusal(404)).follow_events("ftjob-1"))


def test_following_gives_up_when_the_service_stays_away():
    pauses: list[float] = []

    def answer(_request: httpx2.Request) -> httpx2.Response:
        raise httpx2.ConnectError("refused")

    client = LuthierClient(
        "http://service/v1", "k", transport=httpx2.MockTransport(answer), sleep=pauses.append
    )
    with pytest.raises(NotRunningError):
        list(client.follow_events("ftjob-1"))
    assert pauses[:4] == [0.5, 1.0, 2.0, 4.0]
    assert max(pauses) == 5.0


class _Files:
    """A model of one file, served with Range; `serve` may answer other bytes."""

    def __init__(self, name: str = "adapter_model.safetensors") -> None:
        self.name = name
        self.sha256 = hashlib.sha256(_CONTENT).hexdigest()
        self.served: Callable[[int], bytes] = lambda start: _CONTENT[start:]
        self.ranges: list[str | None] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.path.endswith("/files"):
            entry = {"name": self.name, "bytes": len(_CONTENT), "sha256": self.sha256}
            return httpx2.Response(200, content=json.dumps({"object": "list", "data": [entry]}).encode())
        asked = request.headers.get("range")
        self.ranges.append(asked)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked else 0
        return httpx2.Response(206 if asked else 200, content=self.served(start))


@pytest.mark.parametrize(
    ("left", "ranges"),
    [
        (None, [None]),
        # A broken download continues where it stopped; the rest of another version is fetched anew.
        (_CONTENT[:1000], ["bytes=1000-"]),
        (b"\xff" * 1000, ["bytes=1000-", None]),
    ],
)
def test_a_download_is_verified_and_a_second_one_fetches_nothing(tmp_path, left, ranges):
    files = _Files()
    if left is not None:
        (tmp_path / "adapter_model.safetensors.part").write_bytes(left)
    for _ in range(2):
        (path,) = _client(files).download_model("ft:a", tmp_path)
        assert path.read_bytes() == _CONTENT
    assert files.ranges == ranges
    assert not list(tmp_path.glob("*.part"))


def test_wrong_bytes_never_become_the_file(tmp_path):
    files = _Files()
    files.served = lambda _start: b"\x00" * len(_CONTENT)
    with pytest.raises(ArtifactCorruptError, match="sha256"):
        _client(files).download_model("ft:a", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_refused_download_leaves_no_folder(tmp_path):
    client = _client(lambda _request: _refusal(404))
    with pytest.raises(ApiError, match="No such job"):
        client.download_model("ft:a", tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil"])
def test_a_file_name_that_leaves_the_folder_is_refused(tmp_path, name):
    with pytest.raises(ArtifactCorruptError, match="outside"):
        _client(_Files(name)).download_model("ft:a", tmp_path / "model")
    assert not (tmp_path / "evil").exists()


def test_lists_of_aliases_are_read_to_their_last_page():
    def answer(request: httpx2.Request) -> httpx2.Response:
        is_first = "after" not in request.url.params
        assert is_first or request.url.params["after"] == "alias_1"
        page = {"data": [{"id": "alias_1" if is_first else "alias_2"}], "has_more": is_first}
        return httpx2.Response(200, json=page | {"last_id": page["data"][-1]["id"]})

    assert [one["id"] for one in _client(answer).list_aliases()] == ["alias_1", "alias_2"]
