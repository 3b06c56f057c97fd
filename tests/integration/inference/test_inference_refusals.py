"""What the inference server refuses, heals and survives."""

import asyncio
import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from luthier.core.inference import ModelTarget
from luthier.inference.models import loading
from luthier.inference.models.artifact_cache import CachedArtifact
from luthier.inference.models.registry import Models
from luthier.serving import open_backend
from luthier.storage.store import Storage
from tests.conftest import wait_until
from tests.inference_server import BARE, CHAT, COMPLETIONS, Served, make_settings, publish, user
from tests.tiny import build_tiny_base
from tests.unit.inference.artifacts import WEIGHTS_NAME, build_artifact


def test_a_base_that_is_not_fetched_is_not_found_and_says_how_to_fetch_it(served: Served) -> None:
    target = BARE.model_copy(update={"base_id": "other-base"})
    response = served.post(CHAT, target, messages=user("a"))
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (404, "model_not_found")
    assert "luthier bases fetch other-base" in error["message"]


def test_an_artifact_of_another_base_is_refused_and_harms_no_other_chat(
    served: Served, tmp_path: Path
) -> None:
    other = build_tiny_base(tmp_path / "other", seed=5)
    build_artifact(tmp_path / "a", other, seed=0)
    target = publish(served.folder, tmp_path / "a", "other")
    for is_stream in (False, True):
        response = served.post(CHAT, target, messages=user("a"), stream=is_stream)
        assert response.json()["error"]["code"] == "artifact_corrupt"
        assert response.status_code == 503
    assert served.chat("a", max_tokens=1)["choices"]


@pytest.mark.usefixtures("_copies")
@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("damage", ["gone", "torn"])
def test_a_local_copy_that_is_gone_or_damaged_is_fetched_again(
    served: Served, tmp_path: Path, damage: str, is_stream: bool
) -> None:
    seed = 20 + 2 * (damage == "gone") + is_stream
    build_artifact(tmp_path / "a", served.base_folder, seed=seed)
    target = publish(served.folder, tmp_path / "a", f"copy{seed}")
    storage = Storage.open(f"file://{served.folder}/objects")
    # Known to the server, not loaded yet.
    copy = asyncio.run(served.service.models.get(target)).copy
    copied = copy.folder

    def harm() -> None:
        if damage == "gone":
            shutil.rmtree(copied)
        else:
            (copied / WEIGHTS_NAME).write_bytes(b"torn")

    body = {"messages": user("a"), "max_tokens": 2, "stream": is_stream}
    harm()
    storage.delete_prefix(target.artifact)
    response = served.post(CHAT, target, **body)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "artifact_corrupt")
    storage.put_folder(tmp_path / "a", target.artifact)
    asyncio.run(served.service.models.get(target))
    harm()
    response = served.post(CHAT, target, **body)
    assert response.status_code == 200, response.text
    assert (copied / WEIGHTS_NAME).read_bytes() == (tmp_path / "a" / WEIGHTS_NAME).read_bytes()


def test_an_artifact_on_one_disk_is_linked_and_never_answers_damaged(served: Served, tmp_path: Path) -> None:
    build_artifact(tmp_path / "a", served.base_folder, seed=30)
    target = publish(served.folder, tmp_path / "a", "here")
    weights = served.folder / "objects" / target.artifact / WEIGHTS_NAME
    content = weights.read_bytes()
    # Numbers that can be packed like any others: their hash alone shows it.
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for _ in range(2):
        response = served.post(CHAT, target, messages=user("a"), max_tokens=2)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "artifact_corrupt")
    weights.write_bytes(content)
    copy = asyncio.run(served.service.models.get(target)).copy
    assert (copy.folder / WEIGHTS_NAME).samefile(weights)
    # What is published may leave; a model that is known already still answers.
    Storage.open(f"file://{served.folder}/objects").delete_prefix(target.artifact)
    response = served.post(CHAT, target, messages=user("a"), max_tokens=2)
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("is_damaged", [False, True])
def test_files_that_change_while_they_are_read_answer_only_if_they_are_what_they_were(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_damaged: bool
) -> None:
    build_artifact(tmp_path / "a", served.base_folder, seed=31 + is_damaged)
    target = publish(served.folder, tmp_path / "a", f"touched{is_damaged}")
    read_adapter = loading._read_adapter

    def touch(executor: Any, copy: CachedArtifact, *arguments: Any) -> Any:
        made, path = read_adapter(executor, copy, *arguments), copy.folder / WEIGHTS_NAME
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ is_damaged]))
        return made

    monkeypatch.setattr(loading, "_read_adapter", touch)
    response = served.post(CHAT, target, messages=user("a"), max_tokens=2)
    if is_damaged:
        assert (response.status_code, response.json()["error"]["code"]) == (503, "artifact_corrupt")
    else:
        assert response.status_code == 200, response.text


@pytest.mark.usefixtures("_copies")
def test_no_more_copies_are_kept_than_the_settings_allow(
    served: Served, artifacts: list[tuple[ModelTarget, Path]], tmp_path: Path
) -> None:
    settings = make_settings(served.folder, cache_dir=tmp_path / "cache", max_cached_artifacts=1)
    models = Models(settings, served.engine)
    for target, _ in artifacts:
        copy = asyncio.run(models.get(target)).copy
        assert list((tmp_path / "cache" / "artifacts").iterdir()) == [copy.folder]


def test_an_artifact_that_is_not_there_is_refused(served: Served) -> None:
    target = BARE.model_copy(update={"artifact": "projects/p/none", "digest": "sha256:" + "e" * 64})
    response = served.post(CHAT, target, messages=user("a"))
    assert response.json()["error"]["code"] == "artifact_corrupt"


def test_unknown_routes_and_methods_answer_in_openais_shape(served: Served) -> None:
    for response, status in (
        (served.client.get("/v1/embeddings"), 404),
        (served.client.get(CHAT), 405),
        (served.client.post(CHAT, content=b"{}"), 400),
    ):
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_a_lone_surrogate_is_refused_and_names_its_field(served: Served) -> None:
    content = b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}'
    response = served.client.post(CHAT, content=content, headers=BARE.to_headers())
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "invalid_value")
    assert error["param"] == "messages.0.content"


def test_a_fault_of_our_own_answers_in_openais_shape_and_its_text_is_not_logged(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(asked: Any, *_: Any, **__: Any) -> None:
        raise RuntimeError(asked.messages[0].content)

    monkeypatch.setattr("luthier.inference.server.app.plan_chat", fail)
    response = served.post(CHAT, messages=[{"role": "user", "content": "my password is swordfish"}])
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "server_error"
    assert "swordfish" not in response.text
    assert "RuntimeError" in caplog.text and "swordfish" not in caplog.text


def test_a_client_that_does_not_read_holds_up_no_other_and_gets_all_in_order(served: Served) -> None:
    fields = {"prompt": ["a"] * 48, "max_tokens": 200, "logprobs": 5, "temperature": 0, "stream": True}
    body = {"model": "m"} | fields

    async def run() -> list[bytes]:
        backend = open_backend("engine", served.url, "")
        reply = await backend.complete(COMPLETIONS, json.dumps(body).encode(), BARE)
        # More than sockets hold: the server waits with what is left until it is read.
        await asyncio.to_thread(wait_until, lambda: not served.engine.has_work, "all tokens")
        assert served.service._open
        assert (await asyncio.to_thread(served.chat, "a", max_tokens=1))["choices"]
        pieces = [piece async for piece in reply.events]
        await reply.aclose()
        await backend.aclose()
        return pieces

    content = b"".join(asyncio.run(asyncio.wait_for(run(), 60)))
    *events, last = content.removesuffix(b"\n\n").split(b"\n\n")
    assert last == b"data: [DONE]"
    places: dict[int, int] = dict.fromkeys(range(48), 0)
    for event in events:
        if event.startswith(b":"):
            # A comment for the API, which counts the tokens.
            continue
        (choice,) = json.loads(event.removeprefix(b"data: "))["choices"]
        for place in (choice["logprobs"] or {"text_offset": []})["text_offset"]:
            assert place >= places[choice["index"]]
            places[choice["index"]] = place
    wait_until(lambda: not served.service._open, "the stream's end")


def test_a_project_that_fills_the_queue_gets_429_and_keeps_no_other_out(served: Served) -> None:
    other = BARE.model_copy(update={"project_id": "proj_2"})
    served.steps.gate.clear()
    before = served.steps.num_prefills
    with ThreadPoolExecutor(8) as pool:
        running = pool.submit(served.chat, "a", max_tokens=1)
        wait_until(lambda: served.steps.num_prefills > before, "the first prefill")
        prompts = ["a"] * 32
        waiting = [pool.submit(served.post, COMPLETIONS, prompt=prompts, max_tokens=100) for _ in range(2)]
        wait_until(lambda: served.engine.num_waiting == 64, "a full queue")
        theirs = pool.submit(served.chat, "b", other, max_tokens=1)
        wait_until(lambda: served.engine.num_waiting == 65 or theirs.done(), "the other project's chat")
        refused = served.post(CHAT, messages=user("a"))
        served.steps.gate.set()
        assert theirs.result()["choices"]
        # It was next in turn: of those that came before it most still run.
        assert not all(future.done() for future in waiting)
        assert running.result()["choices"]
        assert [len(future.result().json()["choices"]) for future in waiting] == [32, 32]
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    # With the one that runs.
    assert "65 of this project have no answer yet" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 1
    assert served.chat("a", max_tokens=1)["choices"]


def test_a_step_that_hangs_makes_the_server_unready(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.engine, "_stall_seconds", 0.2, raising=False)

    def is_ready() -> bool:
        return bool(served.client.get("/healthz").json()["ready"])

    served.steps.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(served.chat, "a", max_tokens=1)
        try:
            deadline = time.monotonic() + 15
            while is_ready():
                assert time.monotonic() < deadline, "ready though a step hangs"
        finally:
            served.steps.gate.set()
        assert running.result()["choices"]
    wait_until(is_ready, "ready again")
