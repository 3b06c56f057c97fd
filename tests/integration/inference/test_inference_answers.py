"""Answers of the inference server, beside generate and PEFT themselves."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.data.rendering.tokenizer import Tokenizer
from tests.conftest import wait_until
from tests.inference_server import (
    CHAT,
    COMPLETIONS,
    Served,
    expected_text,
    prompt_ids,
    text_of,
    user,
)
from tests.tiny import CONTEXT_LENGTH
from tests.unit.inference.artifacts import greedy, load_plain


def test_requests_that_join_a_running_answer_change_nothing_about_it(served: Served) -> None:
    texts = ["the sky is blue", "b", "what is the colour of the sky on a clear day in the summer?"]
    model = load_plain(served.base_folder)
    with ThreadPoolExecutor(3) as pool:
        asked = []
        for text in texts:
            served.steps.gate.clear()
            before = served.steps.num_prefills
            asked.append(pool.submit(served.chat, text, max_tokens=100))
            wait_until(lambda: len(served.service._open) == len(asked), "the request")
            served.steps.gate.set()
            wait_until(lambda: served.steps.num_prefills > before, "its prefill")  # noqa: B023
        answers = [future.result() for future in asked]
    for text, answer in zip(texts, answers, strict=True):
        assert text_of(answer) == expected_text(served.base_folder, model, text, 100)[0]


@pytest.mark.parametrize("with_usage", [False, True])
def test_a_whole_chat_has_openais_shape_and_a_stream_joined_is_the_same_in_the_contracts_order(
    served: Served, with_usage: bool
) -> None:
    whole = served.chat("the sky", max_tokens=30)
    assert whole["id"].startswith("chatcmpl-") and whole["object"] == "chat.completion"
    assert isinstance(whole["created"], int)
    assert whole["choices"][0]["finish_reason"] == "length" and whole["choices"][0]["logprobs"] is None
    message = whole["choices"][0]["message"]
    assert message["role"] == "assistant" and message["refusal"] is None
    usage = whole["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    options = {"stream_options": {"include_usage": True}} if with_usage else {}
    chunks = served.stream(CHAT, messages=user("the sky"), max_tokens=30, **options)
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
    assert text == text_of(whole)


def test_a_stop_text_across_token_borders_ends_the_answer_and_is_not_in_it(served: Served) -> None:
    text = text_of(served.chat("the sky", max_tokens=40))
    stop = text[11:17]
    assert len(stop) == 6
    answer = served.chat("the sky", max_tokens=40, stop=[stop, "never there"])
    assert text_of(answer) == text[: text.index(stop)]
    assert answer["choices"][0]["finish_reason"] == "stop"
    chunks = served.stream(CHAT, messages=user("the sky"), max_tokens=40, stop=stop)
    pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(pieces) == text[: text.index(stop)]


def test_a_seed_gives_the_same_answer_alone_and_in_a_batch(served: Served) -> None:
    options = {"temperature": 1.0, "seed": 11, "max_tokens": 40}
    alone = text_of(served.chat("the sky", **options))
    served.steps.gate.clear()
    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(served.chat, "a b c", **(options | {"seed": i})) for i in range(3)]
        again = pool.submit(served.chat, "the sky", **options)
        wait_until(lambda: len(served.service._open) == 4, "all requests")
        served.steps.gate.set()
        assert text_of(again.result()) == alone
        assert len({text_of(future.result()) for future in others}) == 3


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
    chunks = served.stream(CHAT, messages=user("the sky"), max_tokens=12, logprobs=True)
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
        # The token that ends a text is rated too.
        assert lengths == {len(ids)}
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


def test_n_answers_come_whole_and_interleaved_by_index_the_same_for_the_same_seed(served: Served) -> None:
    options = {"n": 3, "seed": 11, "temperature": 1.0, "max_tokens": 12}
    answer = served.chat("the sky", **options)
    texts = [choice["message"]["content"] for choice in answer["choices"]]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2] and len(set(texts)) == 3
    assert answer["usage"]["prompt_tokens"] == served.chat("the sky", max_tokens=1)["usage"]["prompt_tokens"]
    one = served.chat("the sky", **(options | {"n": 1}))
    assert text_of(one) == texts[0]
    chunks = served.stream(CHAT, messages=user("the sky"), **options)
    for index in range(3):
        parts = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert parts[0]["delta"]["role"] == "assistant" and parts[-1]["finish_reason"]
        assert "".join(part["delta"].get("content") or "" for part in parts) == texts[index]
    completions = served.post(COMPLETIONS, prompt=["the sky", "a b"], n=2, best_of=2, seed=3).json()
    assert [choice["index"] for choice in completions["choices"]] == [0, 1, 2, 3]


def test_biases_and_penalties_change_what_comes(served: Served, base_folder: Path) -> None:
    def text(**options: Any) -> str:
        return text_of(served.chat("the sky", max_tokens=12, **options))

    [letter] = Tokenizer.load(base_folder).encode("q")
    assert text(logit_bias={str(letter): 100}) == "q" * 12
    assert text(logit_bias={str(letter): 100}, frequency_penalty=2, presence_penalty=-2, seed=1) == "q" * 12
    tokens = served.chat("the sky", max_tokens=60, presence_penalty=2, frequency_penalty=2, logprobs=True)
    plain = served.chat("the sky", max_tokens=60, logprobs=True)
    counts = [
        len({item["token"] for item in answer["choices"][0]["logprobs"]["content"]})
        for answer in (plain, tokens)
    ]
    assert counts[1] > counts[0]


def test_a_prompt_longer_than_the_context_is_refused_with_numbers(served: Served) -> None:
    response = served.post(CHAT, messages=[{"role": "user", "content": "z" * 300}])
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
    assert str(CONTEXT_LENGTH) in error["message"]
    response = served.post(CHAT, messages=user("a"), max_tokens=CONTEXT_LENGTH)
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
def test_a_prompt_of_no_or_unknown_tokens_is_refused(
    served: Served, body: dict[str, Any], param: str
) -> None:
    response = served.post(COMPLETIONS, **body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param
