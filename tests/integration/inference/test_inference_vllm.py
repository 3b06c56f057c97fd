"""The backend `vllm` before a server that speaks vLLM's endpoints and holds no weights."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from luthier.core.errors import (
    ContextLengthExceededError,
    InvalidRequestError,
    LuthierError,
    ModelNotFoundError,
    SelfCheckError,
    UnknownParameterError,
    UnsupportedValueError,
)
from luthier.core.inference import HEADER_DIGEST, ModelTarget
from luthier.core.settings import Settings
from luthier.core.specs import CANARY_NAME, Canary
from luthier.serving import open_all
from luthier.serving.base import Backend, Reply
from luthier.serving.vllm import VllmBackend
from luthier.storage.manifests import seal_folder
from luthier.storage.store import Storage
from tests.fake_vllm import FakeVllm

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
BASE = ModelTarget(model="gpt-4o-mini", base_id="my-base", project_id="proj_1")
LORA = {"peft_type": "LORA", "r": 8}


class Bench:
    """Artifacts in a storage, one vLLM, and the backend before it."""

    def __init__(self, folder: Path, vllm: FakeVllm) -> None:
        self.folder = folder
        self.vllm = vllm
        self.storage = Storage.open(f"file://{folder}/objects")

    def settings(self, **changes: Any) -> Settings:
        values: dict[str, Any] = {
            "inference_backend": "vllm",
            "inference_url": self.vllm.url,
            "internal_token": "secret",
            "storage_url": f"file://{self.folder}/objects",
            "bases_dir": self.folder / "bases",
            "vllm_adapters_dir": self.folder / "adapters",
            "vllm_max_adapters": 2,
        }
        return Settings(_env_file=None, **(values | changes))

    def publish(self, name: str, config: dict[str, Any] | None, *, has_canary: bool = True) -> ModelTarget:
        """Publish an artifact; without a configuration it is a whole model."""
        building = self.folder / f".{name}.building"
        building.mkdir()
        weights = {"w": np.full(4, float(sum(name.encode())), dtype=np.float32)}
        digested = ["adapter_model.safetensors" if config else "model.safetensors"]
        save_file(weights, building / digested[0])
        if config is not None:
            (building / "adapter_config.json").write_text(json.dumps(config))
            digested.append("adapter_config.json")
        if has_canary:
            logits = [20.0 - 1.3 * index for index in range(32)]
            canary = Canary(
                token_ids=[3, 4], candidates=list(range(40, 72)), logits=logits, precision="float32"
            )
            (building / CANARY_NAME).write_text(canary.model_dump_json())
        manifest = seal_folder(
            building, self.folder / name, digested=digested, base_digest="sha256:" + "0" * 64
        )
        prefix = f"projects/p/jobs/{name}/e1/artifact"
        self.storage.put_folder(self.folder / name, prefix)
        return BASE.model_copy(update={"model": f"ft:{name}", "artifact": prefix, "digest": manifest.digest})

    def run(self, test: Callable[[Backend], Awaitable[None]], **changes: Any) -> None:
        async def run() -> None:
            backend = open_all(self.settings(**changes))
            try:
                await test(backend)
            finally:
                await backend.aclose()

        asyncio.run(asyncio.wait_for(run(), 30))


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    with FakeVllm("my-base").serving() as vllm:
        yield Bench(tmp_path, vllm)


async def ask(backend: Backend, target: ModelTarget, path: str = CHAT, **body: Any) -> Reply:
    fields = {"messages": [{"role": "user", "content": "a"}]} if path == CHAT else {"prompt": "a"}
    return await backend.complete(path, json.dumps({"model": target.model} | fields | body).encode(), target)


async def answer(backend: Backend, target: ModelTarget, path: str = CHAT, **body: Any) -> Any:
    return json.loads((await ask(backend, target, path, **body)).content)


async def joined(reply: Reply) -> str:
    return b"".join([piece async for piece in reply.events]).decode()


def name_of(target: ModelTarget) -> str:
    return f"luthier-{str(target.digest).removeprefix('sha256:')}"


def test_base_and_adapter_answer_under_their_public_names_with_openai_s_fields_alone(bench: Bench) -> None:
    tuned = bench.publish("one", LORA)

    async def run(backend: Backend) -> None:
        bare = await answer(backend, BASE, user="u", max_completion_tokens=9)
        assert bare["choices"][0]["message"] == {"role": "assistant", "content": "I am my-base"}
        assert bare["model"] == "gpt-4o-mini"
        reply = await ask(backend, tuned, temperature=0)
        assert reply.headers[HEADER_DIGEST] == tuned.digest
        content = json.loads(reply.content)
        assert content == {
            "id": "cmpl-1",
            "object": "o",
            "created": 5,
            "model": "ft:one",
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": f"I am {name_of(tuned)}"},
                }
            ],
            "usage": {"prompt_tokens": 2, "completion_tokens": 1, "total_tokens": 3},
            "system_fingerprint": str(tuned.digest)[7:19],
        }
        await answer(backend, tuned, COMPLETIONS)

    bench.run(run)
    first, second, third = bench.vllm.asked
    assert first["max_completion_tokens"] == 9 and "user" not in first
    # Nothing of the base's generation_config.json decides.
    assert (first["temperature"], first["top_p"], first["top_k"], first["repetition_penalty"]) == (1, 1, 0, 1)
    assert (second["temperature"], second["max_tokens"]) == (0, 1024)
    assert "max_tokens" not in third
    assert bench.vllm.loads == [name_of(tuned)]
    assert set(bench.vllm.tokens) == {"Bearer secret"}


def test_a_stream_is_renamed_event_by_event_and_closing_it_stops_vllm(bench: Bench) -> None:
    tuned = bench.publish("one", LORA)

    async def run(backend: Backend) -> None:
        reply = await ask(backend, tuned, stream=True)
        *events, used, last = (await joined(reply)).removesuffix("\n\n").split("\n\n")
        # vLLM was asked for its usage, the client did not.
        assert (used, last) == (": usage 2,0,1", "data: [DONE]")
        chunks = [json.loads(event.removeprefix("data: ")) for event in events]
        assert [chunk["model"] for chunk in chunks] == ["ft:one"] * 2
        assert "".join(c["choices"][0]["delta"]["content"] for c in chunks) == f"I am {name_of(tuned)}"
        reply = await ask(backend, tuned, stream=True, stream_options={"include_usage": True})
        content = await joined(reply)
        assert json.loads(content.split("\n\n")[2].removeprefix("data: "))["usage"]["completion_tokens"] == 1
        bench.vllm.gate.clear()
        reply = await ask(backend, tuned, stream=True)
        await anext(reply.events)
        await reply.aclose()
        bench.vllm.gate.set()
        while bench.vllm.num_running:
            await asyncio.sleep(0.01)

    bench.run(run)


def test_the_adapter_unused_for_longest_leaves_and_one_that_answers_or_is_pinned_stays(bench: Bench) -> None:
    one, two, three, four = (bench.publish(name, LORA) for name in ("one", "two", "three", "four"))
    pinned = one.model_copy(update={"is_pinned": True})

    async def run(backend: Backend) -> None:
        await answer(backend, pinned)
        bench.vllm.gate.clear()
        running = await ask(backend, two, stream=True)
        bench.vllm.gate.set()
        # One is pinned and two answers: there is one more for a while.
        await answer(backend, three)
        assert set(bench.vllm.adapters) == {name_of(one), name_of(two), name_of(three)}
        await running.aclose()
        await answer(backend, four)
        assert set(bench.vllm.adapters) == {name_of(one), name_of(four)}
        # The first is no longer pinned: it is the one used last, so the other one leaves.
        await answer(backend, one)
        await answer(backend, two)
        assert set(bench.vllm.adapters) == {name_of(one), name_of(two)}

    bench.run(run)


def test_what_another_process_unloaded_is_loaded_again_and_what_it_loaded_counts(bench: Bench) -> None:
    one, two = bench.publish("one", LORA), bench.publish("two", LORA)
    foreign = f"luthier-{'a' * 64}"
    bench.vllm.adapters |= {foreign: bench.folder, "somebody-elses": bench.folder}

    async def run(backend: Backend) -> None:
        await answer(backend, one)
        # As after a restart, or by another API process.
        del bench.vllm.adapters[name_of(one)]
        await _answers(backend, one)
        await answer(backend, two)
        # What it loaded itself and does not use leaves before what others may use.
        assert set(bench.vllm.adapters) == {"somebody-elses", foreign, name_of(two)}
        assert (await backend.health()).holds >= {"my-base", str(two.digest)}

    bench.run(run)
    assert "somebody-elses" not in bench.vllm.unloads


def test_another_api_process_may_have_loaded_it_already(bench: Bench) -> None:
    one = bench.publish("one", LORA)
    for _ in range(2):
        bench.run(lambda backend: _answers(backend, one))
    assert bench.vllm.loads == [name_of(one)] * 2


async def _answers(backend: Backend, target: ModelTarget) -> None:
    content = await answer(backend, target)
    assert content["choices"][0]["message"]["content"] == f"I am {name_of(target)}"


@pytest.mark.parametrize("config", [LORA | {"use_dora": True}, {"peft_type": "PREFIX_TUNING"}, None])
def test_what_vllm_can_not_serve_is_refused_and_never_answered_by_the_base(
    bench: Bench, config: dict[str, Any] | None
) -> None:
    target = bench.publish("one", config)

    async def run(backend: Backend) -> None:
        with pytest.raises(UnsupportedValueError, match="backend engine") as caught:
            await ask(backend, target)
        assert caught.value.param == "model"
        if config is None:
            assert f"--served-model-name {name_of(target)}" in caught.value.message

    bench.run(run)
    assert bench.vllm.asked == [] and bench.vllm.loads == []


def test_a_whole_model_answers_where_a_server_of_its_own_is_in_the_list(bench: Bench) -> None:
    whole = bench.publish("whole", None)
    on_it = bench.publish("on-it", LORA).model_copy(
        update={"full_model": whole.artifact, "full_model_digest": "sha256:" + "0" * 64}
    )

    async def run(backend: Backend) -> None:
        await _answers(backend, whole)
        await answer(backend, BASE)
        assert bench.vllm.asked[-1]["model"] == "my-base"
        with pytest.raises(ModelNotFoundError, match=f"--served-model-name luthier-{'0' * 64}"):
            await ask(backend, on_it)

    with FakeVllm(name_of(whole)).serving() as own:
        bench.run(run, inference_url=f"{bench.vllm.url},{own.url}")
        assert len(own.asked) == 1


def test_an_adapter_that_says_what_the_base_says_is_refused(bench: Bench) -> None:
    tuned, unrecorded = bench.publish("one", LORA), bench.publish("old", LORA, has_canary=False)
    bench.vllm.has_effect = False

    async def run(backend: Backend) -> None:
        for _ in range(2):
            with pytest.raises(SelfCheckError, match="changes nothing about its base"):
                await ask(backend, tuned)
        assert bench.vllm.adapters == {}
        # Older artifacts have nothing to be compared with.
        await answer(backend, unrecorded)

    bench.run(run)
    assert len(bench.vllm.asked) == 1


def test_refusals_name_the_field_or_what_an_operator_does(bench: Bench) -> None:
    wide = bench.publish("wide", LORA | {"r": 64})

    async def refused(
        backend: Backend, error: type[LuthierError], text: str, *args: Any, **body: Any
    ) -> None:
        with pytest.raises(error, match=text):
            await ask(backend, *args, **body)

    async def run(backend: Backend) -> None:
        await refused(backend, UnknownParameterError, "'top_k'", BASE, top_k=5)
        await refused(backend, UnsupportedValueError, "backend engine", BASE, "/v1/responses")
        await refused(backend, UnsupportedValueError, "at least 1", BASE, COMPLETIONS, max_tokens=0)
        await refused(backend, UnsupportedValueError, "audio", BASE, audio={"voice": "x"})
        await refused(backend, InvalidRequestError, "stream_options", BASE, stream_options={})
        await refused(backend, InvalidRequestError, "n is too large", BASE, n=99)
        await refused(backend, ContextLengthExceededError, "256", BASE, COMPLETIONS, prompt="a" * 2000)
        await refused(backend, LuthierError, "--max-lora-rank", wide)
        other = BASE.model_copy(update={"base_id": "other-base"})
        await refused(backend, ModelNotFoundError, "--served-model-name other-base", other)

    bench.run(run)
    assert [asked["model"] for asked in bench.vllm.asked] == ["my-base"] * 2


def test_health_says_what_the_server_serves_and_how_busy_it_is(bench: Bench) -> None:
    one = bench.publish("one", LORA)

    async def run(backend: Backend) -> None:
        await answer(backend, one)
        health = await backend.health()
        assert health.is_ready and health.serves == {"my-base"}
        assert health.holds == {"my-base", str(one.digest)}
        assert (health.num_running, health.num_waiting) == (3, 2)

    bench.run(run)
    assert isinstance(open_all(bench.settings()), VllmBackend)


def test_a_copy_that_vllm_sees_by_another_path_is_named_by_it(bench: Bench) -> None:
    one = bench.publish("one", LORA)
    (bench.folder / "mount").symlink_to(bench.folder / "adapters")
    bench.run(lambda backend: _answers(backend, one), vllm_adapters_path=f"{bench.folder}/mount/")
    (path,) = bench.vllm.adapters.values()
    assert path == bench.folder / "mount" / str(one.digest).removeprefix("sha256:")
