"""Models of a base that only the paged runner takes: all of them answer over HTTP in one pass a token."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from luthier.bases.catalogue import FACTS_NAME
from luthier.core.inference import ModelTarget
from luthier.core.specs import BaseFacts
from luthier.data.rendering.tokenizer import Tokenizer
from luthier.inference.runners.paged import PagedRunner
from tests.conftest import wait_until
from tests.inference_server import BARE, Served, prompt_ids, publish, text_of
from tests.integration.inference.test_inference_methods import to_text
from tests.tiny import build_tiny_base
from tests.tiny_shapes import build_shape
from tests.unit.inference.artifacts import build_method_artifact, greedy, load_plain, method_greedy

BASE = "tiny-qwen3"
TUNINGS = [{"type": "lora", "rank": 1 + number} for number in range(16)] + [
    {"type": "prefix", "num_virtual_tokens": 5, "init": "random"},
    {"type": "prompt", "num_virtual_tokens": 3, "init": "random"},
    {"type": "adapter", "bottleneck_dim": 8},
]
NUM_TOKENS = 12
TEXT = "the colour of the sea"


@pytest.fixture(scope="module")
def answers(folder: Path, base_folder: Path) -> list[tuple[ModelTarget, str]]:
    """Models, the base first, and what each answers by transformers and PEFT alone."""
    qwen = build_tiny_base(base_folder.with_name(BASE))
    facts = BaseFacts.model_validate_json((qwen / FACTS_NAME).read_bytes())
    (qwen / FACTS_NAME).write_text(facts.model_copy(update={"id": BASE}).model_dump_json())
    for path in build_shape(folder / "shape", "qwen3").iterdir():
        if path.name in ("config.json", "generation_config.json", "model.safetensors"):
            (qwen / path.name).write_bytes(path.read_bytes())
    tokenizer, ids = Tokenizer.load(qwen), prompt_ids(qwen, TEXT)
    bare = BARE.model_copy(update={"base_id": BASE})
    made = [(bare, to_text(tokenizer, greedy(load_plain(qwen), ids, NUM_TOKENS))[0])]
    for number, tuning in enumerate(TUNINGS):
        artifact = build_method_artifact(folder / f"mixed{number}", qwen, tuning, seed=number)
        target = publish(folder, artifact.folder, f"mixed{number}", base_id=BASE)
        answer = method_greedy(qwen, artifact.folder, ids, NUM_TOKENS)
        made.append((target, to_text(tokenizer, answer)[0]))
    # Equal answers would say nothing.
    assert len({text for _, text in made}) > len(TUNINGS) // 2
    return made


def test_models_of_every_method_answer_together_in_one_pass_a_token(
    served: Served, answers: list[tuple[ModelTarget, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(target: ModelTarget) -> str:
        return text_of(served.chat(TEXT, target, max_tokens=NUM_TOKENS))

    # Each alone, which also loads it.
    assert [ask(target) for target, _ in answers] == [text for _, text in answers]
    sizes: list[int] = []
    execute = PagedRunner.execute

    def counted(self: PagedRunner, batch: object, **options: object) -> object:
        sizes.append(len({chunk.adapter for chunk in batch.chunks}))
        return execute(self, batch, **options)

    monkeypatch.setattr(PagedRunner, "execute", counted)
    served.steps.gate.clear()
    with ThreadPoolExecutor(len(answers)) as pool:
        asked = [pool.submit(ask, target) for target, _ in answers]
        wait_until(
            lambda: served.engine.num_waiting + served.engine.num_running == len(answers), "all requests"
        )
        served.steps.gate.set()
        assert [future.result() for future in asked] == [text for _, text in answers]
    # As many as the settings let run together, then the others.
    assert max(sizes) == 16
    assert sizes.count(16) > NUM_TOKENS // 2
    assert len(sizes) < 4 * NUM_TOKENS
