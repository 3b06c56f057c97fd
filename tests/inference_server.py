"""The inference server in a thread, over a real socket, for tests that look behind it."""

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from luthier.core.inference import ModelTarget
from luthier.core.settings import Settings
from luthier.data.rendering.chat_template import ChatTemplate
from luthier.data.rendering.tokenizer import Tokenizer
from luthier.inference.engine.engine import Engine
from luthier.inference.engine.step import BatchExecutor
from luthier.inference.server.app import Service
from luthier.storage.manifests import read_manifest
from luthier.storage.store import Storage
from tests.tiny import BASE_ID
from tests.unit.inference.artifacts import greedy

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
BARE = ModelTarget(model="my-base", base_id=BASE_ID, project_id="proj_1")


class StepGate:
    """Counts steps and prefills, and stops the engine before its next step while the gate is shut."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.num_prefills = 0
        self.num_steps = 0

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Watch all executors."""
        run = BatchExecutor._run

        def gated(executor: BatchExecutor, batch: list[Any]) -> None:
            if batch:
                self.num_prefills += sum(one.sequence.num_completion_tokens == 0 for one, _ in batch)
                self.num_steps += 1
                assert self.gate.wait(30)
            run(executor, batch)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(BatchExecutor, "_run", gated)
            yield


@dataclass
class Served:
    """A running server and what the tests look at behind it."""

    # With bases, objects and cache; and the tiny base in it.
    folder: Path
    base_folder: Path
    client: httpx2.Client
    url: str
    service: Service
    engine: Engine
    steps: StepGate
    loop: asyncio.AbstractEventLoop

    def post(self, path: str, target: ModelTarget = BARE, **body: Any) -> httpx2.Response:
        return self.client.post(path, json={"model": "m"} | body, headers=target.to_headers())

    def chat(self, text: str, target: ModelTarget = BARE, **body: Any) -> dict[str, Any]:
        response = self.post(CHAT, target, messages=user(text), **({"temperature": 0} | body))
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


def prompt_ids(base_folder: Path, text: str) -> list[int]:
    rendered = ChatTemplate.load(base_folder).render(
        [{"role": "user", "content": text}], add_generation_prompt=True
    )
    return Tokenizer.load(base_folder).encode(rendered)


def publish(folder: Path, made: Path, name: str, **changes: Any) -> ModelTarget:
    """Put a sealed artifact into the server's storage; return the model that it makes."""
    prefix = f"projects/p/{name}"
    Storage.open(f"file://{folder}/objects").put_folder(made, prefix)
    update = {"model": name, "artifact": prefix, "digest": read_manifest(made).digest}
    return BARE.model_copy(update=update | changes)


def user(text: str) -> list[dict[str, str]]:
    """Return the messages of a chat of one turn."""
    return [{"role": "user", "content": text}]


def text_of(answer: dict[str, Any]) -> str:
    """Return the text of a chat's first answer."""
    return answer["choices"][0]["message"]["content"]


def expected_text(base_folder: Path, model: Any, text: str, num_tokens: int) -> tuple[str, int]:
    """Return what `generate` answers to a chat, without its end, and how many tokens that took."""
    tokenizer = Tokenizer.load(base_folder)
    ids = greedy(model, prompt_ids(base_folder, text), num_tokens)
    return tokenizer.decode([token for token in ids if token not in tokenizer.stop_token_ids]), len(ids)
