"""Sample prompts are refused before anything is trained, by their place in the list."""

from pathlib import Path

import pytest

from luthier.core.errors import InvalidValueError
from luthier.data.prepare.sample_prompts import check_sample_prompts
from tests.tiny import build_tiny_base


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    build_tiny_base(folder)
    return folder


def test_prompts_that_fit_pass_and_without_any_no_base_is_read(base):
    check_sample_prompts(["who?", "and why?"], base, max_tokens=256)
    check_sample_prompts([], base / "absent", max_tokens=256)


def test_a_prompt_that_leaves_no_room_for_an_answer_is_named(base):
    with pytest.raises(InvalidValueError, match="256 must hold an answer") as caught:
        check_sample_prompts(["who?", "a? " * 300], base, max_tokens=256)
    assert caught.value.param == "training.sample_prompts.1"
    assert "a? a?" not in caught.value.message


def test_a_prompt_that_the_template_refuses_is_named_with_the_templates_words(base):
    template = base / "chat_template.jinja"
    refusal = "{% if 'no' in messages[0]['content'] %}{{ raise_exception('not this') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    with pytest.raises(InvalidValueError, match="not this") as caught:
        check_sample_prompts(["yes", "no secret"], base, max_tokens=256)
    assert caught.value.param == "training.sample_prompts.1"
    assert "secret" not in caught.value.message
