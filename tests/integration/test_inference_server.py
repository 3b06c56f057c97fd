"""The inference server over a real socket, with the tiny base and random artifacts, beside PEFT itself."""

import asyncio
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
import uvicorn

from luthier.core.errors import UnavailableError
from luthier.core.inference import HEADER_DIGEST, ModelTarget
from luthier.core.settings import Settings
from luthier.data.render import ChatTemplate
from luthier.data.tokens import Tokenizer
from luthier.inference.adapters import WEIGHTS_NAME
from luthier.inference.app import Service, build_app
from luthier.inference.backends import open_backend
from luthier.inference.engine import Engine, EngineCore
from luthier.inference.models import Models
from luthier.inference.runner import Runner
from luthier.inference.sequence import Sequence
from luthier.inference.server import open_socket
from luthier.storage.store import Storage
from tests.tiny import BASE_ID, CONTEXT_LENGTH, build_tiny_base
from tests.unit.inference.artifacts import build_artifact, greedy, load_plain, load_reference

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
BARE = ModelTarget(model="my-base", base_id=BASE_ID, project_id="proj_1")


class GatedRunner(Runner):
    """The real runner, which stands still while the gate is shut."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.num_prefills = 0
        self.num_steps = 0

    def prefill(self, sequences: list[Sequence], in_use: set[str]) -> Any:
        self.num_prefills += 1
        assert self.gate.wait(30)
        return super().prefill(sequences, in_use)

    def step(self, batch: Any, token_ids: list[int]) -> torch.Tensor:
        self.num_steps += 1
        assert self.gate.wait(30)
        return super().step(batch, token_ids)


@dataclass
class Served:
    """A running server and what the tests look at behind it."""

    client: httpx2.Client
    url: str
    service: Service
    core: EngineCore
    engine: Engine
    runner: GatedRunner

    def post(self, path: str, target: ModelTarget = BARE, **body: Any) -> httpx2.Response:
        return self.client.post(path, json={"model": "m"} | body, headers=target.to_headers())

    def chat(self, text: str, target: ModelTarget = BARE, **body: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": text}]
        response = self.post(CHAT, target, messages=messages, **({"temperature": 0} | body))
        assert response.status_code == 200, response.text
        content: dict[str, Any] = response.json()
        return content

    def stream(self, path: str, target: ModelTarget = BARE, **body: Any) -> list[dict[str, Any]]:
        response = self.post(path, target, stream=True, **({"temperature": 0} | body))
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


def wait_until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, f"not within 30 s: {what}"
        time.sleep(0.005)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    # A socket's path has 107 bytes at most; pytest's own folders may be longer.
    with tempfile.TemporaryDirectory(prefix="lt-") as name:
        yield Path(name)


@pytest.fixture(scope="module")
def base_folder(folder: Path) -> Path:
    return build_tiny_base(folder / "bases" / BASE_ID)


@pytest.fixture(scope="module")
def artifacts(folder: Path, base_folder: Path) -> list[tuple[ModelTarget, Path]]:
    storage = Storage.open(f"file://{folder}/objects")
    made = []
    for seed in range(3):
        manifest = build_artifact(folder / f"artifact{seed}", base_folder, seed=seed)
        prefix = f"projects/p/jobs/{seed}/e1/artifact"
        storage.put_folder(folder / f"artifact{seed}", prefix)
        target = BARE.model_copy(
            update={"model": f"ft:tiny:{seed}", "artifact": prefix, "digest": manifest.digest}
        )
        made.append((target, folder / f"artifact{seed}"))
    return made


def make_settings(folder: Path, **changes: Any) -> Settings:
    values: dict[str, Any] = {
        "bases_dir": folder / "bases",
        "storage_url": f"file://{folder}/objects",
        "cache_dir": folder / "cache",
        "inference_url": f"unix://{folder}/s.sock",
        "inference_dtype": "float32",
        "device": "cpu",
        "num_threads": 1,
        "preload_base": BASE_ID,
        "max_waiting_requests": 64,
    }
    return Settings(_env_file=None, **(values | changes))


@pytest.fixture(scope="module")
def served(folder: Path, base_folder: Path) -> Iterator[Served]:
    torch.set_num_threads(1)
    settings = make_settings(folder)
    runner = GatedRunner()
    core = EngineCore(
        runner, max_batch_rows=settings.max_batch_rows, max_cache_tokens=settings.max_cache_tokens
    )
    engine = Engine(core, max_waiting=settings.max_waiting_requests)
    service = Service(settings, engine)
    listener = open_socket(settings.inference_url)
    server = uvicorn.Server(uvicorn.Config(build_app(service, settings, token=None), log_config=None))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    engine.start()
    thread.start()
    transport = httpx2.HTTPTransport(uds=str(folder / "s.sock"))
    with httpx2.Client(transport=transport, base_url="http://inference", timeout=60) as client:
        wait_until(lambda: server.started, "the server's start")
        wait_until(lambda: client.get("/healthz").json()["ready"], "the base's load")
        yield Served(client, settings.inference_url, service, core, engine, runner)
    runner.gate.set()
    server.should_exit = True
    thread.join(10)
    engine.close()
    engine.join(10)


def prompt_ids(base_folder: Path, text: str) -> list[int]:
    rendered = ChatTemplate.load(base_folder).render(
        [{"role": "user", "content": text}], add_generation_prompt=True
    )
    return Tokenizer.load(base_folder).encode(rendered)


def test_models_that_run_at_the_same_time_answer_as_generate_does_for_each_alone(
    served: Served, base_folder: Path, artifacts: list[tuple[ModelTarget, Path]]
) -> None:
    models = [(BARE, load_plain(base_folder))]
    models += [(target, load_reference(base_folder, path)) for target, path in artifacts]
    texts = ["the sky", "what is the colour of the sea on a clear day?", "a"]
    cases = [(target, model, text) for text in texts for target, model in models]
    served.runner.gate.clear()
    with ThreadPoolExecutor(len(cases)) as pool:
        asked = [pool.submit(served.chat, text, target, max_tokens=40) for target, _, text in cases]
        # All are there before any runs: one group per model, of rows of different lengths.
        wait_until(lambda: len(served.service._open) == len(cases), "all requests")
        served.runner.gate.set()
        answers = [future.result() for future in asked]
    tokenizer = Tokenizer.load(base_folder)
    texts_by_model: dict[str, set[str]] = {}
    for (target, model, text), answer in zip(cases, answers, strict=True):
        ids = greedy(model, prompt_ids(base_folder, text), 40)
        expected = tokenizer.decode([token for token in ids if token not in tokenizer.stop_token_ids])
        assert answer["choices"][0]["message"]["content"] == expected
        assert answer["usage"]["completion_tokens"] == len(ids)
        assert answer["usage"]["prompt_tokens"] == len(prompt_ids(base_folder, text))
        assert answer["model"] == target.model
        texts_by_model.setdefault(target.model, set()).add(expected)
    # The models differ at all, or the equality above says nothing.
    assert len({frozenset(texts) for texts in texts_by_model.values()}) == len(models)


def test_requests_that_join_a_running_answer_change_nothing_about_it(
    served: Served, base_folder: Path
) -> None:
    texts = ["the sky is blue", "b", "what is the colour of the sky on a clear day in the summer?"]
    model, tokenizer = load_plain(base_folder), Tokenizer.load(base_folder)
    with ThreadPoolExecutor(3) as pool:
        asked = []
        for text in texts:
            served.runner.gate.clear()
            before = served.runner.num_prefills
            asked.append(pool.submit(served.chat, text, max_tokens=100))
            wait_until(lambda: len(served.service._open) == len(asked), "the request")
            served.runner.gate.set()
            wait_until(lambda: served.runner.num_prefills > before, "its prefill")  # noqa: B023
        answers = [future.result() for future in asked]
    for text, answer in zip(texts, answers, strict=True):
        ids = greedy(model, prompt_ids(base_folder, text), 100)
        expected = tokenizer.decode([token for token in ids if token not in tokenizer.stop_token_ids])
        assert answer["choices"][0]["message"]["content"] == expected


def test_an_answer_says_which_digest_made_it(
    served: Served, artifacts: list[tuple[ModelTarget, Path]]
) -> None:
    target = artifacts[0][0]
    assert target.digest is not None
    response = served.post(CHAT, target, messages=[{"role": "user", "content": "a"}], max_tokens=1)
    assert response.headers[HEADER_DIGEST] == target.digest
    assert response.json()["system_fingerprint"] == target.digest.removeprefix("sha256:")[:12]


def test_a_whole_chat_has_openais_shape(served: Served) -> None:
    answer = served.chat("a", max_tokens=3)
    assert answer["id"].startswith("chatcmpl-") and answer["object"] == "chat.completion"
    assert isinstance(answer["created"], int)
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None and choice["index"] == 0
    assert choice["message"]["role"] == "assistant" and choice["message"]["refusal"] is None
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("with_usage", [False, True])
def test_a_stream_joined_is_the_whole_answer_in_the_contracts_order(served: Served, with_usage: bool) -> None:
    messages = [{"role": "user", "content": "the sky"}]
    whole = served.chat("the sky", max_tokens=30)
    options = {"stream_options": {"include_usage": True}} if with_usage else {}
    chunks = served.stream(CHAT, messages=messages, max_tokens=30, **options)
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    if with_usage:
        last = chunks.pop()
        assert last["choices"] == [] and last["usage"] == whole["usage"]
        assert all(chunk["usage"] is None for chunk in chunks)
    else:
        assert all("usage" not in chunk for chunk in chunks)
    choices = [chunk["choices"][0] for chunk in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
    assert choices[-1]["delta"] == {} and choices[-1]["finish_reason"] == "length"
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    text = "".join(choice["delta"]["content"] for choice in choices[:-1])
    assert text == whole["choices"][0]["message"]["content"]


def test_a_stop_text_across_token_borders_ends_the_answer_and_is_not_in_it(served: Served) -> None:
    text = served.chat("the sky", max_tokens=40)["choices"][0]["message"]["content"]
    stop = text[11:17]
    assert len(stop) == 6
    answer = served.chat("the sky", max_tokens=40, stop=[stop, "never there"])
    assert answer["choices"][0]["message"]["content"] == text[: text.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    chunks = served.stream(CHAT, messages=[{"role": "user", "content": "the sky"}], max_tokens=40, stop=stop)
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == text[: text.index(stop)]


def test_a_seed_gives_the_same_answer_alone_and_in_a_batch(served: Served) -> None:
    options = {"temperature": 1.0, "seed": 11, "max_tokens": 40}
    alone = served.chat("the sky", **options)["choices"][0]["message"]["content"]
    served.runner.gate.clear()
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(served.chat, "a b c", **(options | {"seed": i})) for i in range(3)]
        again = pool.submit(served.chat, "the sky", **options)
        wait_until(lambda: len(served.service._open) == 4, "all requests")
        served.runner.gate.set()
        assert again.result()["choices"][0]["message"]["content"] == alone
        assert len({future.result()["choices"][0]["message"]["content"] for future in others}) == 3


def test_logprobs_equal_those_of_the_model_for_the_whole_text(served: Served, base_folder: Path) -> None:
    answer = served.chat("the sky", max_tokens=12, logprobs=True, top_logprobs=5)
    content = answer["choices"][0]["logprobs"]["content"]
    ids = prompt_ids(base_folder, "the sky")
    model = load_plain(base_folder)
    answer_ids = greedy(model, ids, 12)
    with torch.inference_mode():
        logprobs_TV = torch.log_softmax(model(torch.tensor([ids + answer_ids])).logits[0], dim=-1)
    tokenizer = Tokenizer.load(base_folder)
    assert len(content) == len(answer_ids)
    for i, (item, token_id) in enumerate(zip(content, answer_ids, strict=True)):
        row_V = logprobs_TV[len(ids) - 1 + i]
        assert bytes(item["bytes"]) == tokenizer.token_bytes(token_id)
        assert item["logprob"] == pytest.approx(float(row_V[token_id]), abs=1e-4)
        expected = row_V.topk(5).values.tolist()
        assert [top["logprob"] for top in item["top_logprobs"]] == pytest.approx(expected, abs=1e-4)


def test_a_streams_logprobs_are_those_of_the_whole_answer(served: Served) -> None:
    whole = served.chat("the sky", max_tokens=12, logprobs=True)
    chunks = served.stream(
        CHAT, messages=[{"role": "user", "content": "the sky"}], max_tokens=12, logprobs=True
    )
    streamed = [
        item
        for chunk in chunks
        if chunk["choices"][0]["logprobs"]
        for item in chunk["choices"][0]["logprobs"]["content"]
    ]
    expected = whole["choices"][0]["logprobs"]["content"]
    assert [item["token"] for item in streamed] == [item["token"] for item in expected]
    assert all(item["top_logprobs"] == [] for item in streamed)


def test_a_completion_answers_every_prompt_at_its_index(served: Served, base_folder: Path) -> None:
    tokenizer, model = Tokenizer.load(base_folder), load_plain(base_folder)
    prompts = ["the sky", "what is the colour"]
    answer = served.post(COMPLETIONS, prompt=prompts, temperature=0, logprobs=2).json()
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    total = 0
    for index, (prompt, choice) in enumerate(zip(prompts, answer["choices"], strict=True)):
        ids = greedy(model, tokenizer.encode(prompt), 16)
        total += len(ids)
        assert choice["index"] == index
        kept = [token for token in ids if token not in tokenizer.stop_token_ids]
        assert choice["text"] == tokenizer.decode(kept)
        logprobs = choice["logprobs"]
        lengths = {len(logprobs[name]) for name in ("tokens", "token_logprobs", "top_logprobs")}
        assert lengths == {len(kept)}
        assert logprobs["text_offset"][0] == 0
    assert answer["usage"]["completion_tokens"] == total
    chunks = served.stream(COMPLETIONS, prompt=prompts)
    for index in range(2):
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in parts) == answer["choices"][index]["text"]
        assert parts[-1]["finish_reason"] == answer["choices"][index]["finish_reason"]


def test_a_completion_of_no_tokens_is_empty(served: Served) -> None:
    answer = served.post(COMPLETIONS, prompt=[5, 6], max_tokens=0).json()
    assert answer["choices"][0]["text"] == "" and answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 0


def test_a_prompt_longer_than_the_context_is_refused_with_numbers(served: Served) -> None:
    response = served.post(CHAT, messages=[{"role": "user", "content": "z" * 300}])
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert str(CONTEXT_LENGTH) in error["message"]
    response = served.post(CHAT, messages=[{"role": "user", "content": "a"}], max_tokens=CONTEXT_LENGTH)
    assert response.json()["error"]["code"] == "context_length_exceeded"


def test_an_answer_of_unnamed_length_ends_at_the_context(served: Served, base_folder: Path) -> None:
    answer = served.chat("the sky")
    if answer["choices"][0]["finish_reason"] == "length":
        assert answer["usage"]["total_tokens"] == CONTEXT_LENGTH
    else:
        assert answer["usage"]["total_tokens"] < CONTEXT_LENGTH


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt.0"),
        ({"prompt": [[1], [10**6]]}, "prompt.1"),
        ({"prompt": [-1]}, "prompt.0"),
    ],
)
def test_a_prompt_without_tokens_or_with_unknown_ones_is_refused(
    served: Served, body: dict[str, Any], param: str
) -> None:
    response = served.post(COMPLETIONS, **body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_a_base_that_is_not_fetched_is_not_found_and_says_how_to_fetch_it(served: Served) -> None:
    target = BARE.model_copy(update={"base_id": "other-base"})
    response = served.post(CHAT, target, messages=[{"role": "user", "content": "a"}])
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (404, "model_not_found")
    assert "luthier bases fetch other-base" in error["message"]


def test_an_artifact_of_another_base_is_refused_and_nobody_else_notices(
    served: Served, folder: Path, tmp_path: Path
) -> None:
    other = build_tiny_base(tmp_path / "other", seed=5)
    manifest = build_artifact(tmp_path / "a", other, seed=0)
    Storage.open(f"file://{folder}/objects").put_folder(tmp_path / "a", "projects/p/other")
    target = BARE.model_copy(update={"artifact": "projects/p/other", "digest": manifest.digest})
    for is_stream in (False, True):
        response = served.post(CHAT, target, messages=[{"role": "user", "content": "a"}], stream=is_stream)
        assert response.json()["error"]["code"] == "artifact_corrupt"
        assert response.status_code == 503
    assert served.chat("a", max_tokens=1)["choices"]


@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("damage", ["gone", "torn"])
def test_a_local_copy_that_is_gone_or_damaged_is_fetched_again(
    served: Served, folder: Path, base_folder: Path, tmp_path: Path, damage: str, is_stream: bool
) -> None:
    seed = 20 + 2 * (damage == "gone") + is_stream
    manifest = build_artifact(tmp_path / "a", base_folder, seed=seed)
    prefix = f"projects/p/copy{seed}"
    storage = Storage.open(f"file://{folder}/objects")
    storage.put_folder(tmp_path / "a", prefix)
    target = BARE.model_copy(update={"artifact": prefix, "digest": manifest.digest})
    # Known to the server, not loaded yet.
    copied = asyncio.run(served.service.models.get(target)).folder
    assert copied is not None

    def harm() -> None:
        if damage == "gone":
            shutil.rmtree(copied)
        else:
            (copied / WEIGHTS_NAME).write_bytes(b"torn")

    messages = [{"role": "user", "content": "a"}]
    body = {"messages": messages, "max_tokens": 2, "stream": is_stream}
    harm()
    storage.delete_prefix(prefix)
    response = served.post(CHAT, target, **body)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "artifact_corrupt")
    storage.put_folder(tmp_path / "a", prefix)
    asyncio.run(served.service.models.get(target))
    harm()
    response = served.post(CHAT, target, **body)
    assert response.status_code == 200, response.text
    assert (copied / WEIGHTS_NAME).read_bytes() == (tmp_path / "a" / WEIGHTS_NAME).read_bytes()


def test_no_more_copies_are_kept_than_the_settings_allow(
    folder: Path, base_folder: Path, artifacts: list[tuple[ModelTarget, Path]], tmp_path: Path
) -> None:
    settings = make_settings(folder, cache_dir=tmp_path / "cache", max_cached_artifacts=1)
    models = Models(settings)
    for target, _ in artifacts:
        served_model = asyncio.run(models.get(target))
        assert list((tmp_path / "cache" / "artifacts").iterdir()) == [served_model.folder]


def test_an_artifact_that_is_not_there_is_refused(served: Served) -> None:
    target = BARE.model_copy(update={"artifact": "projects/p/none", "digest": "sha256:" + "e" * 64})
    response = served.post(CHAT, target, messages=[{"role": "user", "content": "a"}])
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

    monkeypatch.setattr("luthier.inference.app.plan_chat", fail)
    response = served.post(CHAT, messages=[{"role": "user", "content": "my password is swordfish"}])
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "server_error"
    assert "swordfish" not in response.text
    assert "RuntimeError" in caplog.text and "swordfish" not in caplog.text


def test_more_requests_than_may_wait_get_429_and_when_to_come_again(served: Served) -> None:
    served.runner.gate.clear()
    before = served.runner.num_prefills
    with ThreadPoolExecutor(65) as pool:
        running = pool.submit(served.chat, "a", max_tokens=1)
        wait_until(lambda: served.runner.num_prefills > before, "the first prefill")
        prompts = ["a"] * 32
        waiting = [pool.submit(served.post, COMPLETIONS, prompt=prompts, max_tokens=1) for _ in range(2)]
        wait_until(lambda: served.engine.num_waiting == 64, "a full queue")
        refused = served.post(CHAT, messages=[{"role": "user", "content": "a"}])
        served.runner.gate.set()
        assert running.result()["choices"]
        assert [len(future.result().json()["choices"]) for future in waiting] == [32, 32]
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert int(refused.headers["retry-after"]) >= 1
    assert served.chat("a", max_tokens=1)["choices"]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_client_that_leaves_frees_its_row(served: Served, is_stream: bool) -> None:
    async def leave() -> None:
        backend = open_backend("engine", served.url, "")
        body = {"messages": [{"role": "user", "content": "a"}], "model": "m", "stream": is_stream}
        asked = asyncio.create_task(
            backend.complete(CHAT, json.dumps(body | {"max_tokens": 200, "temperature": 0}).encode(), BARE)
        )
        if is_stream:
            reply = await asked
            async for chunk in reply.body:
                assert chunk.startswith(b"data: ")
                break
            served.runner.gate.clear()
            await reply.body.aclose()
        else:
            while served.core.scheduler.num_live_rows == 0:
                await asyncio.sleep(0.001)
            served.runner.gate.clear()
            asked.cancel()
            await asyncio.gather(asked, return_exceptions=True)
        await backend.aclose()

    wait_until(lambda: not served.core.scheduler.has_work, "an idle engine")
    asyncio.run(leave())
    wait_until(lambda: not served.service._open, "the server's notice")
    steps = served.runner.num_steps
    served.runner.gate.set()
    wait_until(lambda: not served.core.scheduler.has_work, "the row's end")
    assert served.runner.num_steps <= steps + 2


def test_a_stream_whose_reader_is_cancelled_frees_its_row(served: Served) -> None:
    async def leave() -> None:
        backend = open_backend("engine", served.url, "")
        body = {"messages": [{"role": "user", "content": "a"}], "model": "m", "stream": True}
        reply = await backend.complete(CHAT, json.dumps(body | {"max_tokens": 200}).encode(), BARE)
        served.runner.gate.clear()

        async def read() -> None:
            async for _ in reply.body:
                pass

        reader = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
        # The client lives on, as the API's does.
        while served.service._open:
            await asyncio.sleep(0.005)
        await backend.aclose()

    asyncio.run(asyncio.wait_for(leave(), 30))
    served.runner.gate.set()
    wait_until(lambda: not served.core.scheduler.has_work, "the row's end")


def test_a_server_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    async def ask() -> None:
        backend = open_backend("engine", f"unix://{tmp_path}/none.sock", "")
        with pytest.raises(UnavailableError) as caught:
            await backend.complete(CHAT, b"{}", BARE)
        assert caught.value.http_status == 503
        with pytest.raises(UnavailableError):
            await backend.health()
        await backend.aclose()

    asyncio.run(ask())
