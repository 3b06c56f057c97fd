"""Rendering and token ids are those of transformers, on the tiny base and on every fetched one."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from luthier.core.settings import Settings
from luthier.data.render import ChatTemplate
from luthier.data.tokens import Tokenizer
from tests.tiny import build_tiny_base

SYSTEM = {"role": "system", "content": "You are terse."}
USER = {"role": "user", "content": "Give me 3 names,\n\n  12 towns  and 7 <|im_end|> marks: né 🎉 日本\t{}"}
ASSISTANT = {"role": "assistant", "content": '{"names": ["Zoë", "Ås"],\n    "n": 12}'}
CONVERSATIONS = [[USER], [SYSTEM, USER], [USER, ASSISTANT], [SYSTEM, USER, ASSISTANT, USER, ASSISTANT]]


def _fetched_bases() -> list[Path]:
    return sorted(path.parent for path in Settings().bases_dir.glob("*/manifest.json"))


@pytest.fixture(scope="module", params=["tiny", *_fetched_bases()], ids=lambda value: Path(value).name)
def base(request, tmp_path_factory):
    if request.param == "tiny":
        return build_tiny_base(tmp_path_factory.mktemp("bases") / "tiny")
    return request.param


@pytest.fixture(scope="module")
def theirs(base):
    return AutoTokenizer.from_pretrained(base, local_files_only=True, trust_remote_code=False)


@pytest.mark.parametrize("add_generation_prompt", [False, True])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=len)
def test_chats_render_and_tokenise_as_transformers_does(base, theirs, messages, add_generation_prompt):
    text = ChatTemplate.load(base).render(messages, add_generation_prompt=add_generation_prompt)
    arguments = {"add_generation_prompt": add_generation_prompt}
    assert text == theirs.apply_chat_template(messages, tokenize=False, **arguments)
    expected = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, **arguments)
    assert Tokenizer.load(base).encode(text) == expected


@pytest.mark.parametrize("skip_special", [False, True])
def test_answers_decode_as_transformers_does(base, theirs, skip_special):
    tokenizer = Tokenizer.load(base)
    ids = tokenizer.encode("".join(message["content"] for message in (SYSTEM, USER, ASSISTANT)))
    assert tokenizer.decode(ids, skip_special=skip_special) == theirs.decode(
        ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
    )


def test_the_turn_ends_with_what_transformers_calls_the_end(base, theirs):
    assert theirs.eos_token_id in Tokenizer.load(base).stop_token_ids
