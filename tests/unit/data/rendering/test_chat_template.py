import json

import pytest

from luthier.core.errors import BaseUnavailableError, InvalidValueError
from luthier.data.rendering import chat_template
from luthier.data.rendering.chat_template import ChatTemplate
from tests.tiny import build_tiny_base

USER = {"role": "user", "content": "hi <b>"}


def test_developer_is_rendered_as_system():
    template = ChatTemplate("{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
    text = template.render([{"role": "developer", "content": "x"}, USER], add_generation_prompt=False)
    assert text == "[system]x[user]hi <b>"


def test_text_parts_are_joined_and_other_parts_refused():
    template = ChatTemplate("{{ messages[0].content }}")
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template.render([{"role": "user", "content": parts}], add_generation_prompt=False) == "ab"
    with pytest.raises(InvalidValueError, match="Only text"):
        template.render([{"role": "user", "content": [{"type": "image_url"}]}], add_generation_prompt=False)


CALLING = {
    "role": "assistant",
    "content": None,
    "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": {"a": "é"}}}],
}


@pytest.mark.parametrize("arguments", [{"a": "é"}, '{"a": "é"}'], ids=["object", "text"])
@pytest.mark.parametrize(
    "written",
    [
        "{{ call.function.arguments | tojson }}",
        "{{ call.function.arguments if call.function.arguments is string "
        "else call.function.arguments | tojson }}",
        "{{ '' + call.function.arguments }}",
        "{{ call.function.arguments }}",
    ],
    ids=["object", "either", "joined text", "printed text"],
)
def test_arguments_of_calls_are_written_as_json_whatever_the_template_wants(written, arguments):
    template = ChatTemplate(
        "{% for m in messages %}{% for call in m.tool_calls or [] %}" + written + "{% endfor %}{% endfor %}"
    )
    calling = json.loads(json.dumps(CALLING))
    calling["tool_calls"][0]["function"]["arguments"] = arguments
    assert template.render([USER, calling], add_generation_prompt=False) == '{"a": "é"}'


def test_a_template_says_what_it_has_a_place_for():
    template = ChatTemplate("{% if tools %}{{ tools }}{% endif %}{{ messages[0].content }}")
    assert template.supports("tools")
    assert not template.supports("tool_calls")
    assert not template.supports("reasoning_content")


def test_special_tokens_and_the_helpers_of_templates_are_there():
    source = (
        "{{ bos_token }}{{ messages[0].content | tojson }}{{ strftime_now('%%') }}"
        "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
        "{% generation %}x{% endgeneration %}"
    )
    assert ChatTemplate(source, {"bos_token": "<s>"}).render([USER], add_generation_prompt=False) == (
        '<s>"hi <b>"%01x'
    )


@pytest.mark.parametrize(
    ("source", "reported"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ nothing.at.all }}", "UndefinedError"),
    ],
)
def test_a_template_that_refuses_is_an_error_of_the_messages(source, reported):
    with pytest.raises(InvalidValueError, match=reported) as caught:
        ChatTemplate(source).render([USER], add_generation_prompt=False)
    assert caught.value.param == "messages"
    assert "hi" not in caught.value.message


def test_a_template_that_writes_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARS", 1000)
    with pytest.raises(InvalidValueError, match="too large"):
        ChatTemplate("{% for i in range(99999) %}xxxx{% endfor %}").render([], add_generation_prompt=False)


def test_the_template_is_read_from_its_file_or_from_the_tokenizer_configuration(tmp_path):
    base = build_tiny_base(tmp_path / "base")
    from_file = ChatTemplate.load(base).render([USER], add_generation_prompt=True)
    assert from_file.endswith("<|im_start|>user\nhi <b><|im_end|>\n<|im_start|>assistant\n")
    (base / "chat_template.jinja").unlink()
    (base / "tokenizer_config.json").write_text(
        '{"chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}]}'
    )
    assert ChatTemplate.load(base).render([USER], add_generation_prompt=True) == "D"


def test_a_base_without_a_template_or_with_a_broken_one_says_so(tmp_path):
    base = build_tiny_base(tmp_path / "base")
    (base / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(BaseUnavailableError, match="syntax error in line 1"):
        ChatTemplate.load(base)
    (base / "chat_template.jinja").unlink()
    with pytest.raises(BaseUnavailableError, match="no chat template"):
        ChatTemplate.load(base)
