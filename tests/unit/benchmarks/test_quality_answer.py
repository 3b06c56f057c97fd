"""Batched answers with a cache equal what each method's own logits say, one token after the other."""

from pathlib import Path

import pytest
import torch

from benchmarks.quality.answer import Answerer
from benchmarks.quality.task import Prompt, to_messages
from luthier.data.rendering.chat_template import ChatTemplate
from luthier.data.rendering.tokenizer import Tokenizer
from luthier.methods import discover, method_of_artifact
from luthier.modeling.load import load_base
from tests.unit.inference.artifacts import build_method_artifact

_PROMPTS: list[Prompt] = [
    (("user", "what is the colour of the sky?"),),
    (("system", "be brief"), ("user", "why?")),
    (("user", "one"), ("assistant", "two"), ("user", "three and four and five and six")),
]
_NUM_TOKENS = 6


@torch.no_grad()
def _slow_answer(base: Path, artifact: Path | None, prompt: Prompt) -> str:
    """Answer by running the whole sequence anew for every token."""
    tokenizer = Tokenizer.load(base)
    causal_lm = load_base(base, dtype=torch.float32, device="cpu")
    ids = tokenizer.encode(ChatTemplate.load(base).render(to_messages(prompt), add_generation_prompt=True))
    num_before = len(ids)
    method = None if artifact is None else method_of_artifact(artifact)
    attached = None if method is None or artifact is None else method.load(causal_lm, artifact)
    for _ in range(_NUM_TOKENS):
        ids_1T = torch.tensor([ids])
        if method is None or attached is None:
            logits_1TV = causal_lm(input_ids=ids_1T).logits
        else:
            logits_1TV = method.logits(attached, ids_1T)
        token = int(logits_1TV[0, -1].argmax())
        if token in tokenizer.stop_token_ids:
            break
        ids.append(token)
    return tokenizer.decode(ids[num_before:])


@pytest.mark.parametrize("name", ["base", *discover()])
def test_answers_in_one_batch_are_those_of_the_model_alone(base, tmp_path, name):
    artifact = None
    if name != "base":
        # Every trained number is far from its start.
        artifact = build_method_artifact(tmp_path / "a", base, {"type": name}, seed=1, scale=1.0).folder
    answerer = Answerer(base, artifact, dtype=torch.float32, num_threads=torch.get_num_threads(), num_rows=2)
    answers = answerer.answer(_PROMPTS, max_new_tokens=_NUM_TOKENS)
    assert answers == [_slow_answer(base, artifact, prompt) for prompt in _PROMPTS]
    assert any(answers)
