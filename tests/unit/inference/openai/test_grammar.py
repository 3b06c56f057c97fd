"""Grammars over the tiny tokenizer: what they take, what they refuse, and that they are kept."""

import json
from pathlib import Path
from typing import Any

import pytest

from luthier.core.errors import InvalidValueError, LuthierError
from luthier.data.rendering.tokenizer import Tokenizer
from luthier.inference.openai.grammar import Grammars, TokenGrammar, json_rule
from tests.tiny import write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Tokenizer(Tokenizer.load(folder).pipeline, [2])


def start(tokenizer: Tokenizer, schema: dict[str, Any]) -> TokenGrammar:
    lark = f"start: {json_rule(schema, param='schema')}"
    return Grammars().compile(lark, tokenizer, "digest", param="schema").start()


def push(grammar: TokenGrammar, tokenizer: Tokenizer, text: str) -> bool:
    """Push a text as far as it is allowed and return whether all of it was."""
    for token_id in tokenizer.encode(text):
        if not grammar.allows(token_id):
            assert not grammar.mask()[token_id]
            return False
        assert grammar.mask()[token_id]
        grammar.push(token_id)
    return True


def test_a_text_of_the_schema_is_taken_to_its_end_and_no_further(tokenizer):
    grammar = start(
        tokenizer, {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    )
    assert push(grammar, tokenizer, '{"a": 12') and not grammar.is_finished and not grammar.allows(2)
    assert push(grammar, tokenizer, "}") and grammar.is_finished


def test_an_end_is_allowed_where_the_text_may_be_whole(tokenizer):
    grammar = start(tokenizer, {"type": "integer"})
    assert not grammar.allows(2)
    assert push(grammar, tokenizer, "12") and grammar.allows(2) and not grammar.is_finished


def test_white_space_has_an_end(tokenizer):
    assert push(start(tokenizer, {"type": "object"}), tokenizer, '{\n    "a": 1,\n    "b": [ 1, 2 ]\n}')
    assert not push(start(tokenizer, {"type": "object"}), tokenizer, "{\n\n")
    assert not push(start(tokenizer, {"type": "object"}), tokenizer, "{" + " " * 9)


def test_answers_of_one_grammar_go_their_own_ways_and_it_is_compiled_once(tokenizer):
    grammars = Grammars()
    lark = "start: " + json_rule({"enum": ["red", "green"]}, param="schema")
    compiled = grammars.compile(lark, tokenizer, "digest", param="schema")
    assert grammars.compile(lark, tokenizer, "digest", param="schema") is compiled
    assert grammars.compile(lark, tokenizer, "other", param="schema") is not compiled
    answers = [compiled.start(), compiled.start()]
    assert push(answers[0], tokenizer, '"red"') and push(answers[1], tokenizer, '"green"')


def test_a_token_that_is_not_allowed_is_an_error_that_quotes_nothing(tokenizer, capfd):
    grammar = start(tokenizer, {"type": "integer"})
    with pytest.raises(LuthierError) as caught:
        grammar.push(tokenizer.encode("q")[0])
    assert caught.value.message.endswith("(InternalError). Simplify the schema.")
    assert capfd.readouterr() == ("", "")


def test_schemas_too_deep_or_bases_without_an_end_are_refused(tokenizer):
    deep: dict[str, Any] = {}
    for _ in range(400):
        deep = {"items": deep}
    endless = Tokenizer(tokenizer.pipeline)
    for schema, used in ((deep, tokenizer), (json.loads("{}"), endless)):
        with pytest.raises(InvalidValueError) as caught:
            start(used, schema)
        assert caught.value.param == "schema"
