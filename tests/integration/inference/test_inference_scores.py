"""`echo` with `logprobs`, as harnesses ask how likely a text is, beside the models' own log_softmax."""

from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.core.inference import ModelTarget
from luthier.data.rendering.tokenizer import Tokenizer
from tests.inference_server import BARE, COMPLETIONS, Served, publish
from tests.tiny import CONTEXT_LENGTH
from tests.unit.inference.artifacts import build_method_artifact, load_plain, method_logits

TEXTS = ["the sky is blue \N{EURO SIGN}5", "what is the colour of the sea?" * 3, "a"]


@pytest.fixture(scope="module")
def targets(folder: Path, base_folder: Path) -> list[tuple[ModelTarget, Path | None]]:
    tunings: list[dict[str, Any]] = [
        {"type": "lora", "rank": 4},
        {"type": "prefix", "num_virtual_tokens": 5, "init": "random"},
        {"type": "full"},
    ]
    found: list[tuple[ModelTarget, Path | None]] = [(BARE, None)]
    for seed, tuning in enumerate(tunings):
        artifact = build_method_artifact(folder / f"scored{seed}", base_folder, tuning, seed=seed)
        found.append((publish(folder, artifact.folder, f"scored{seed}"), artifact.folder))
    return found


def logprobs_of(base_folder: Path, artifact: Path | None, ids: list[int]) -> torch.Tensor:
    if artifact is not None:
        return torch.log_softmax(method_logits(base_folder, artifact, ids), dim=-1)
    with torch.inference_mode():
        return torch.log_softmax(load_plain(base_folder)(torch.tensor([ids])).logits[0], dim=-1)


def check_choice(
    choice: dict[str, Any], tokenizer: Tokenizer, ids: list[int], logprobs_TV: torch.Tensor
) -> None:
    """Check what a choice says of its prompt, and that its parts fit together."""
    rated = choice["logprobs"]
    assert rated["token_logprobs"][0] is None and rated["top_logprobs"][0] is None
    assert rated["tokens"][: len(ids)] == [tokenizer.token_text(token_id) for token_id in ids]
    for i, token_id in enumerate(ids[1:], 1):
        row_V = logprobs_TV[i - 1]
        assert rated["token_logprobs"][i] == pytest.approx(float(row_V[token_id]), abs=2e-4)
        # How harnesses see whether a token is the likeliest.
        is_greedy = rated["token_logprobs"][i] == max(rated["top_logprobs"][i].values())
        assert is_greedy == (int(row_V.argmax()) == token_id)
    assert len({len(values) for values in rated.values()}) == 1
    for token, start in zip(rated["tokens"], rated["text_offset"], strict=True):
        if "\ufffd" not in token and not token.startswith("<|"):
            assert choice["text"][start : start + len(token)] == token


@pytest.mark.parametrize("max_tokens", [0, 1, 6])
@pytest.mark.parametrize("as_ids", [False, True])
def test_an_echo_with_logprobs_says_how_likely_the_prompts_were_under_each_kind_of_model(
    served: Served, targets: list[tuple[ModelTarget, Path | None]], max_tokens: int, as_ids: bool
) -> None:
    tokenizer = Tokenizer.load(served.base_folder)
    ids = [tokenizer.encode(text) for text in TEXTS]
    for target, artifact in targets:
        body = {"prompt": ids if as_ids else TEXTS, "max_tokens": max_tokens, "temperature": 0}
        scored = served.post(COMPLETIONS, target, echo=True, logprobs=1, **body)
        assert scored.status_code == 200, scored.text
        plain = served.post(COMPLETIONS, target, logprobs=1, **body).json()
        assert scored.json()["usage"] == plain["usage"]
        for i, choice in enumerate(scored.json()["choices"]):
            check_choice(choice, tokenizer, ids[i], logprobs_of(served.base_folder, artifact, ids[i]))
            expected = plain["choices"][i]
            assert choice["text"] == TEXTS[i] + expected["text"]
            assert choice["finish_reason"] == expected["finish_reason"]
            # What is made after the prompt is rated as without an echo; also a token that ends the text.
            if max_tokens:
                assert choice["logprobs"]["tokens"][len(ids[i]) :] == expected["logprobs"]["tokens"]
            if max_tokens == 1:
                assert len(choice["logprobs"]["tokens"]) == len(ids[i]) + 1
            offsets = [start + len(TEXTS[i]) for start in expected["logprobs"]["text_offset"]]
            assert choice["logprobs"]["text_offset"][len(ids[i]) :] == offsets


def test_a_streams_echo_says_what_the_whole_answers_does(served: Served) -> None:
    options: dict[str, Any] = {"prompt": TEXTS, "echo": True, "logprobs": 2, "max_tokens": 4}
    whole = served.post(COMPLETIONS, temperature=0, **options).json()["choices"]
    chunks = served.stream(COMPLETIONS, **options)
    for index, choice in enumerate(whole):
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert parts[0]["text"] == TEXTS[index]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name, values in choice["logprobs"].items():
            streamed = [value for part in parts if part["logprobs"] for value in part["logprobs"][name]]
            if name in {"tokens", "text_offset"}:
                assert streamed == values


def test_an_end_of_text_is_rated_as_a_token(served: Served, base_folder: Path) -> None:
    tokenizer = Tokenizer.load(base_folder)
    [end] = tokenizer.encode("<|im_end|>")
    options: dict[str, Any] = {"max_tokens": 5, "logit_bias": {str(end): 100}, "echo": True, "logprobs": 0}
    choice = served.post(COMPLETIONS, prompt="a", **options).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("a", "stop")
    assert choice["logprobs"]["tokens"] == ["a", "<|im_end|>"]
    assert choice["logprobs"]["text_offset"] == [0, 1]


def test_a_prompt_as_long_as_the_context_is_scored_where_no_answer_is_wanted(served: Served) -> None:
    options: dict[str, Any] = {"prompt": [7] * CONTEXT_LENGTH, "echo": True, "logprobs": 1}
    choice = served.post(COMPLETIONS, max_tokens=0, **options).json()["choices"][0]
    assert len(choice["logprobs"]["tokens"]) == CONTEXT_LENGTH
    refused = served.post(COMPLETIONS, max_tokens=1, **options)
    assert refused.json()["error"]["code"] == "context_length_exceeded"


def test_many_scores_at_once_all_come_back(served: Served) -> None:
    prompts = [[7 + i] * 200 for i in range(6)]
    choices = served.post(COMPLETIONS, prompt=prompts, max_tokens=0, echo=True, logprobs=0).json()["choices"]
    assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [200] * 6
