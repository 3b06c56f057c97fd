"""How calls are written, found from templates of several kinds, and read from texts cut anywhere."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from luthier.core.errors import InvalidValueError
from luthier.data.rendering.chat_template import ChatTemplate
from luthier.data.rendering.tokenizer import Tokenizer
from luthier.inference.openai.grammar import CompiledGrammar, Grammars
from luthier.inference.openai.structured_output import choose_grammar
from luthier.inference.openai.tool_calls import (
    CallArguments,
    CallBegun,
    CallSyntax,
    ToolCallParser,
    find_syntax,
    render_calls,
)
from luthier.inference.openai.tools import Tools, read_tools
from tests.tiny import write_tokenizer

_TURNS = (
    "{{% if tools %}}<|im_start|>{words}{{{{ tools | tojson }}}}<|im_end|>{{% endif %}}"
    "{{% for m in messages %}}{{{{ '<|im_start|>' + m.role + '\\n' }}}}"
    "{{% if m.tool_calls %}}{{{{ m.content or '' }}}}{calls}"
    "{{% else %}}{{{{ m.content }}}}{{% endif %}}{{{{ '<|im_end|>\\n' }}}}{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n' }}}}{{% endif %}}"
)
_EACH = "{% for c in m.tool_calls %}"
CALLS = {
    "hermes": _EACH + "{% if not loop.first %}{{ '\\n' }}{% endif %}"
    '{{ \'<tool_call>\\n{"name": "\' + c.function.name + \'", "arguments": \' }}'
    "{{ c.function.arguments | tojson }}{{ '}\\n</tool_call>' }}{% endfor %}",
    "thinking": "{{ '<think>\\n\\n</think>\\n\\n' }}" + _EACH + '{{ \'<tool_call>\\n{"name": "\' }}'
    '{{ c.function.name }}{{ \'", "arguments": \' }}{{ c.function.arguments | tojson }}'
    "{{ '}\\n</tool_call>\\n' }}{% endfor %}",
    "looking": "{% if '</think>' in m.content %}{% endif %}" + _EACH + '{{ \'<tool_call>\\n{"name": "\' }}'
    '{{ c.function.name }}{{ \'", "arguments": \' }}{{ c.function.arguments | tojson }}'
    "{{ '}\\n</tool_call>' }}{% endfor %}",
    "llama": "{% if m.tool_calls | length > 1 %}{{ raise_exception('One call only.') }}{% endif %}"
    '{{ \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{ m.tool_calls[0].function.arguments | tojson }}{{ '}' }}",
    "mistral": "{{ '[TOOL_CALLS] [' }}" + _EACH + "{% if c.id | length != 9 %}"
    "{{ raise_exception('Nine letters.') }}{% endif %}{% if not loop.first %}{{ ', ' }}{% endif %}"
    '{{ \'{"name": "\' + c.function.name + \'", "arguments": \' }}{{ c.function.arguments | tojson }}'
    "{{ ', \"id\": \"' + c.id + '\"}' }}{% endfor %}{{ ']' }}",
    "xml": _EACH + "<function={{ c.function.name }}></function>{% endfor %}",
}


def template(kind: str) -> ChatTemplate:
    return ChatTemplate(_TURNS.format(calls=CALLS[kind], words="system\n"))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder: Path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    inner.add_special_tokens(["[TOOL_CALLS]"])
    return Tokenizer(inner, [2])


def syntax_of(kind: str, tokenizer: Tokenizer) -> Any:
    return find_syntax(template(kind), tokenizer)


_BETWEEN = "\n</tool_call>\n<tool_call>\n"
_MISTRAL = {"is_list": True, "has_short_ids": True, "shown_token_ids": frozenset({300})}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("hermes", CallSyntax("<tool_call>\n", "\n</tool_call>", between=_BETWEEN)),
        ("thinking", CallSyntax("<tool_call>\n", "\n</tool_call>\n", between=_BETWEEN)),
        ("looking", CallSyntax("<tool_call>\n", "\n</tool_call>", between="\n</tool_call><tool_call>\n")),
        ("llama", CallSyntax("", "", middle='", "parameters": ', arguments_key="parameters")),
        ("mistral", CallSyntax("[TOOL_CALLS] ", "", between=", ", **_MISTRAL)),
    ],
)
def test_the_template_itself_shows_how_calls_are_written(tokenizer, kind, expected):
    assert syntax_of(kind, tokenizer) == expected


def test_calls_without_a_text_are_rendered_by_templates_that_look_into_every_text():
    call = {"id": "call_1", "type": "function", "function": {"name": "go", "arguments": "{}"}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    assert '{"name": "go"' in render_calls(template("looking"), messages, [], add_generation_prompt=False)
    with pytest.raises(InvalidValueError):
        render_calls(ChatTemplate("{{ raise_exception('no') }}"), messages, [], add_generation_prompt=False)


def test_a_template_that_describes_calls_in_words_alone_is_taken_at_its_word(tokenizer):
    words = "system\nAnswer in <tool_call></tool_call>: "
    described = ChatTemplate(_TURNS.format(calls="{{ m.tool_calls[0].nothing.at_all }}", words=words))
    found = find_syntax(described, tokenizer)
    assert found is not None and found.begin == "<tool_call>\n"


def test_calls_that_are_no_json_have_no_syntax(tokenizer):
    assert find_syntax(template("xml"), tokenizer) is None


def read(syntax: CallSyntax, text: str, size: int, *, is_parallel: bool = True) -> tuple[str, list[Any]]:
    """Push a text in pieces; return the content, and each call's name and arguments."""
    reader = ToolCallParser(syntax, frozenset({"look", "go"}), is_parallel=is_parallel)
    parts = [part for at in range(0, len(text), size) for part in reader.push(text[at : at + size])]
    content, calls = "", []
    for part in [*parts, *reader.flush()]:
        if isinstance(part, CallBegun):
            assert part.place == len(calls) and part.id
            calls.append([part.name, ""])
        elif isinstance(part, CallArguments):
            calls[part.place][1] += part.text
        else:
            content += part
    return content, [tuple(call) for call in calls]


LOOK = '{"name": "look", "arguments": {"at": "a \\"{sky}\\" é", "n": [1, {"b": 2}]}}'
LOOKED = ("look", '{"at": "a \\"{sky}\\" é", "n": [1, {"b": 2}]}')
GO = '{"name": "go", "arguments": {}}'


def tagged(call: str) -> str:
    return f"<tool_call>{call}</tool_call>"


LOOK_OF_LLAMA, GO_OF_LLAMA = LOOK.replace("arguments", "parameters"), GO.replace("arguments", "parameters")


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("kind", "text", "content", "calls"),
    [
        ("hermes", "Just a text. ", "Just a text. ", []),
        ("hermes", tagged(f"\n{LOOK}\n"), "", [LOOKED]),
        ("hermes", f"\n{tagged(LOOK)}\n{tagged(GO)}\n", "", [LOOKED, ("go", "{}")]),
        ("hermes", f"I look. \n{tagged(LOOK)}Done.", "I look.Done.", [LOOKED]),
        ("hermes", "a <tool_cat> b < c", "a <tool_cat> b < c", []),
        ("hermes", tagged('{"name": "fly", "arguments": {}}'), None, []),
        ("hermes", tagged("no json"), None, []),
        ("hermes", tagged('{"arguments": {"x": 1}, "name": "go"}'), "", [("go", '{"x": 1}')]),
        ("hermes", tagged('{"name": "go", "arguments": "{\\"x\\": 1}"}'), "", [("go", '{"x": 1}')]),
        ("hermes", tagged('{"name": "go"}'), "", [("go", "{}")]),
        ("hermes", tagged('{"name": "go", "arguments": {"x": 1 } }'), "", [("go", '{"x": 1 }')]),
        ("hermes", '<tool_call>{"name": "go", "arguments": {"x": "cu', "", [("go", '{"x": "cu')]),
        ("hermes", '<tool_call>{"name": "g', None, []),
        ("llama", LOOK_OF_LLAMA, "", [LOOKED]),
        ("llama", "\n" + GO_OF_LLAMA, "", [("go", "{}")]),
        ("llama", '{"colour": "red"}', '{"colour": "red"}', []),
        ("llama", "It is {blue}.", "It is {blue}.", []),
        ("mistral", f"[TOOL_CALLS] [{LOOK}, {GO}]", "", [LOOKED, ("go", "{}")]),
        ("mistral", f'[TOOL_CALLS][{LOOK[:-1]}, "id": "abcdefghi"}}]', "", [LOOKED]),
        ("mistral", "It is [blue].", "It is [blue].", []),
    ],
)
def test_calls_are_read_wherever_the_text_is_cut(tokenizer, kind, text, content, calls, size):
    # None: what is no call in the end stays the text that it was.
    assert read(syntax_of(kind, tokenizer), text, size) == (text if content is None else content, calls)


def test_one_call_at_most_is_read_where_calls_are_not_parallel(tokenizer):
    text = f"<tool_call>{GO}</tool_call><tool_call>{LOOK}</tool_call>"
    assert read(syntax_of("hermes", tokenizer), text, 5, is_parallel=False) == ("", [("go", "{}")])


def test_ids_are_of_the_length_that_the_template_takes(tokenizer):
    for kind, length in (("hermes", 29), ("mistral", 9)):
        syntax = syntax_of(kind, tokenizer)
        reader = ToolCallParser(syntax, frozenset({"go"}), is_parallel=True)
        parts = reader.push(f"{syntax.begin}{'[' * syntax.is_list}{GO}")
        assert [len(part.id) for part in parts if isinstance(part, CallBegun)] == [length]


def tools(choice: Any = None, *, strict: bool = False, is_parallel: bool = True) -> Tools:
    parameters = {"type": "object", "properties": {"n": {"type": "integer"}}, "additionalProperties": False}
    given = [
        {"type": "function", "function": {"name": "look", "parameters": parameters, "strict": strict}},
        {"type": "function", "function": {"name": "go", "parameters": {"not": {}}}},
    ]
    return read_tools({"tools": given, "tool_choice": choice, "parallel_tool_calls": is_parallel})


def grammar_of(kind: str, tokenizer: Tokenizer, asked: Tools, answer: Any = None) -> CompiledGrammar | None:
    grammars = Grammars()

    def compile_grammar(lark: str, param: str) -> CompiledGrammar:
        return grammars.compile(lark, tokenizer, "digest", param=param)

    return choose_grammar(answer, asked, syntax_of(kind, tokenizer), tokenizer, compile_grammar)


def takes(grammar: CompiledGrammar | None, tokenizer: Tokenizer, text: str) -> bool:
    """Whether an answer may be a text."""
    answer = grammar.start()
    for token_id in tokenizer.encode(text):
        if not answer.allows(token_id):
            return False
        answer.push(token_id)
    return answer.is_finished or answer.allows(2)


@pytest.mark.parametrize("kind", ["hermes", "llama", "mistral"])
def test_required_calls_are_written_as_the_template_does_and_by_the_schema(tokenizer, kind):
    syntax = syntax_of(kind, tokenizer)
    opening, closing = ("[", "]") if syntax.is_list else ("", "")

    def answer(*calls: tuple[str, dict[str, Any]]) -> str:
        written = [syntax.head + name + syntax.middle + json.dumps(value) + "}" for name, value in calls]
        return syntax.begin + opening + (syntax.between or ";").join(written) + closing + syntax.end

    required = grammar_of(kind, tokenizer, tools("required"))
    assert takes(required, tokenizer, answer(("look", {"n": 1})))
    assert takes(required, tokenizer, answer(("go", {"anything": [1]})))
    assert not takes(required, tokenizer, answer(("look", {"n": "x"})))
    assert not takes(required, tokenizer, answer(("fly", {})))
    assert not takes(required, tokenizer, "A text.")
    two = answer(("look", {"n": 1}), ("go", {}))
    assert takes(required, tokenizer, two) == (syntax.between is not None)
    assert not takes(grammar_of(kind, tokenizer, tools("required", is_parallel=False)), tokenizer, two)
    named = grammar_of(kind, tokenizer, tools({"type": "function", "function": {"name": "go"}}))
    assert takes(named, tokenizer, answer(("go", {})))
    assert not takes(named, tokenizer, answer(("look", {"n": 1})))


@pytest.mark.parametrize("kind", ["hermes", "mistral"])
def test_strict_tools_are_held_to_their_schema_where_the_model_chooses_to_call(tokenizer, kind):
    assert grammar_of(kind, tokenizer, tools()) is None
    syntax, grammar = syntax_of(kind, tokenizer), grammar_of(kind, tokenizer, tools(strict=True))
    opening, closing = ("[", "]") if syntax.is_list else ("", "")
    for text, is_taken in (
        ("A text with < and {.", True),
        (f'A text.{syntax.begin}{opening}{syntax.head}look{syntax.middle}{{"n": 1}}}}', True),
        (f'{syntax.begin}{opening}{syntax.head}look{syntax.middle}{{"n": "x"}}}}', False),
    ):
        whole = text if syntax.begin not in text else text + closing + syntax.end
        assert takes(grammar, tokenizer, whole) is is_taken
