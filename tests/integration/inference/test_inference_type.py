"""The type that the inference server takes by itself, and what it serves in float32 all the same."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
import torch

from luthier.core.inference import ModelTarget
from luthier.core.specs import CANARY_NAME, Canary
from luthier.data.rendering.tokenizer import Tokenizer
from luthier.storage.manifests import read_manifest, seal_folder
from luthier_cpu.codegen import kernels
from tests import tiny
from tests.inference_server import BARE, COMPLETIONS, publish
from tests.integration.inference.test_inference_process import started, until_ready
from tests.unit.inference.artifacts import build_artifact, greedy, load_reference

pytestmark = pytest.mark.skipif(
    not kernels.has_pairs(), reason="the processor has no products of bfloat16 pairs (AVX-512 BF16)"
)
IDS = [9, 30, 41, 5, 77, 12, 8]
# Of a logit, and of bfloat16's rounding of it: far above the one in float32.
_SMALL = 0.03


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A base whose products are large enough to be faster in bfloat16."""
    with tempfile.TemporaryDirectory(prefix="lt-") as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "HIDDEN_SIZE", 512)
        patch.setattr(tiny, "_HEAD_SIZE", 128)
        patch.setattr(tiny, "_FEED_FORWARD_SIZE", 2048)
        tiny.build_tiny_base(Path(name) / "bases" / tiny.BASE_ID)
        yield Path(name)


@contextmanager
def running(folder: Path, log: Path) -> Iterator[httpx2.Client]:
    """Run a server with the settings that it has by itself; `log` has what it wrote, afterwards."""
    with started(folder, f"unix://{folder}/d.sock", LUTHIER_INFERENCE_DTYPE="auto") as (process, client):
        until_ready(process, client)
        yield client
        process.terminate()
        log.write_bytes(process.communicate(timeout=30)[1])


def publish_rated(folder: Path, name: str, logits_V: torch.Tensor, candidates: list[int]) -> ModelTarget:
    """Publish the artifact `made` once more, with what training would have recorded of some tokens."""
    building = folder / f".{name}"
    shutil.copytree(folder / "made", building)
    logits = logits_V[candidates].tolist()
    canary = Canary(token_ids=IDS, candidates=candidates, logits=logits, precision="float32")
    (building / CANARY_NAME).write_text(canary.model_dump_json())
    # A setting that changes no answer, so that each has a digest of its own.
    config = json.loads((building / "adapter_config.json").read_text()) | {"revision": name}
    (building / "adapter_config.json").write_text(json.dumps(config))
    made = read_manifest(folder / "made")
    seal_folder(building, folder / name, digested=made.digested, base_digest=made.base_digest)
    return publish(folder, folder / name, name)


def test_bfloat16_is_served_by_default_and_a_model_that_it_rounds_too_much_in_float32(
    folder: Path, tmp_path: Path
) -> None:
    base = folder / "bases" / tiny.BASE_ID
    build_artifact(folder / "made", base, seed=3, scale=0.05)
    reference = load_reference(base, folder / "made")
    with torch.inference_mode():
        logits_V = reference(torch.tensor([IDS])).logits[0, -1]
    likeliest = logits_V.topk(8).indices.tolist()
    # Rounding is a large part of these logits, and of no others.
    smallest = (logits_V.abs() - _SMALL).abs().topk(8, largest=False).indices.tolist()
    good = publish_rated(folder, "good", logits_V, likeliest)
    rounded = publish_rated(folder, "rounded", logits_V, smallest)
    wrong = publish_rated(folder, "wrong", logits_V.flip(0), likeliest)
    body = {"model": "m", "prompt": [IDS], "max_tokens": 8, "temperature": 0}
    expected = greedy(reference, IDS, 8)

    def ask(client: httpx2.Client, target: ModelTarget) -> httpx2.Response:
        return client.post(COMPLETIONS, json=body, headers=target.to_headers())

    with running(folder, tmp_path / "first.log") as client:
        types = {}
        for name, target in (("base", BARE), ("good", good), ("rounded", rounded), ("again", rounded)):
            answer = ask(client, target)
            assert answer.status_code == 200, answer.text
            types[name] = answer.json()["system_fingerprint"].partition("-")[2]
        assert types == {"base": "bfloat16", "good": "bfloat16", "rounded": "float32", "again": "float32"}
        answer = ask(client, rounded).json()["choices"][0]["text"]
        assert answer == Tokenizer.load(base).decode(expected, skip_special=True)
        refused = ask(client, wrong)
        assert (refused.status_code, refused.json()["error"]["code"]) == (500, "self_check_failed")
    log = (tmp_path / "first.log").read_text()
    assert re.search(r"The runner \w+ serves \S+ in bfloat16\.", log)
    assert f"{rounded.digest} is served in float32: it fails its check in bfloat16" in log
    assert f"{good.digest} " not in log
    # What was verified in float32 is not verified in it again.
    with running(folder, tmp_path / "second.log") as client:
        assert ask(client, good).json()["system_fingerprint"].endswith("-bfloat16")
    log = (tmp_path / "second.log").read_text()
    assert "in memory in float32 too" not in log
