"""Batched answers with a cache equal what each method's own logits say, one token after the other."""

from pathlib import Path

import pytest
import torch

from benchmarks.quality.answer import Answerer
from benchmarks.quality.task import Prompt, to_messages
from luthier.bases.catalogue import FACTS_NAME
from luthier.core.specs import BaseFacts
from luthier.data.rendering.chat_template import ChatTemplate
from luthier.data.rendering.tokenizer import Tokenizer
from luthier.methods import Start, Workload, discover, method_of_artifact
from luthier.methods._tuning import check_tuning, parse_tuning
from luthier.modeling.load import load_base

_PROMPTS: list[Prompt] = [
    (("user", "what is the colour of the sky?"),),
    (("system", "be brief"), ("user", "why?")),
    (("user", "one"), ("assistant", "two"), ("user", "three and four and five and six")),
]
_NUM_TOKENS = 6


def _make_artifact(base: Path, folder: Path, name: str) -> Path:
    """Save an artifact of a method whose every trained number is far from its start."""
    facts = BaseFacts.model_validate_json((base / FACTS_NAME).read_bytes())
    method, params = parse_tuning(check_tuning({"type": name}))
    params = method.resolve(params, Workload(facts, num_rows=8, num_tokens=100))
    causal_lm = load_base(base, dtype=torch.float32, device="cpu")
    tokenizer = Tokenizer.load(base)
    start = Start(seed=1, base_id=facts.id, tokenize=tokenizer.encode, examples=[[5, 6, 7, 8]])
    attached = method.attach(causal_lm, params, start)
    torch.manual_seed(2)
    with torch.no_grad():
        for _, parameter in attached.named_trained_parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    folder.mkdir()
    method.save(attached, folder)
    return folder


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
def test_answers_in_one_batch_are_those_of_the_model_alone(base: Path, tmp_path: Path, name: str) -> None:
    artifact = None if name == "base" else _make_artifact(base, tmp_path / "artifact", name)
    answerer = Answerer(base, artifact, dtype=torch.float32, num_threads=torch.get_num_threads(), num_rows=2)
    answers = answerer.answer(_PROMPTS, max_new_tokens=_NUM_TOKENS)
    assert answers == [_slow_answer(base, artifact, prompt) for prompt in _PROMPTS]
    assert any(answers)
