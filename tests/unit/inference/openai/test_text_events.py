"""A text on its way out: what is made once for all of an answer's chunks gives the bytes of each."""

from types import SimpleNamespace
from typing import Any

import pytest

from luthier.data.rendering.tokenizer import Tokenizer
from luthier.inference.openai.chat_response import ChatFormatter, ChoicesFormatter, CompletionFormatter
from luthier.inference.openai.generation import Part
from tests.tiny import BASE_ID, build_tiny_base

TEXTS = ["a", "", ' "quoted" \\ and {"content":null}', "zwölf 🧵\n\t", "\0text\0", "</s>\u2028"]


@pytest.mark.parametrize("with_usage", [True, False])
@pytest.mark.parametrize("with_logprobs", [True, False])
@pytest.mark.parametrize("make", [ChatFormatter, CompletionFormatter])
def test_a_text_is_the_event_of_its_part(tmp_path, make, with_usage, with_logprobs):
    asked: Any = SimpleNamespace(
        num_logprobs=0 if with_logprobs else None,
        stream_options=SimpleNamespace(include_usage=with_usage),
        must_call=False,
    )
    tokenizer = Tokenizer.load(build_tiny_base(tmp_path / BASE_ID))
    ready: Any = SimpleNamespace(
        served=SimpleNamespace(fingerprint="fp_1"), base=SimpleNamespace(tokenizer=tokenizer)
    )
    shape: ChoicesFormatter = make(asked, 'ft:base:text"null', ready)
    for index in (0, 2, 0):
        for text in TEXTS:
            assert shape.text_event(index, text) == b"".join(shape.part_events(Part(index, text)))
