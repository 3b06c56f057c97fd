import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from luthier.core.errors import InvalidTrainingFileError, InvalidValidationFileError, InvalidValueError
from luthier.data.formats.chat import FORMAT
from luthier.data.prepare.preparation import prepare_rows
from luthier.data.rendering.chat_template import ChatTemplate
from luthier.data.rendering.loss_mask import render_turns
from luthier.data.rendering.tokenizer import Tokenizer
from tests.rows import read_line
from tests.tiny import build_tiny_base

QUESTION = {"role": "user", "content": "what is the colour?"}
ANSWER = {"role": "assistant", "content": "blue, and the sea is 🟦 the same"}


def prepare(tmp_path, base, *rows, max_length=256, too_long="error", purpose="training"):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return prepare_rows(path, base, max_length=max_length, too_long=too_long, purpose=purpose)


def supervised_text(rows, index, base):
    tokens, mask = rows.row(index)
    return Tokenizer.load(base).decode(tokens[mask].tolist(), skip_special=False)


def test_supervised_are_the_answer_and_its_end_of_turn_and_not_the_newline_after_it(tmp_path, base):
    rows, report = prepare(tmp_path, base, [QUESTION, ANSWER])
    assert supervised_text(rows, 0, base) == ANSWER["content"] + "<|im_end|>"
    tokens, mask = rows.row(0)
    assert Tokenizer.load(base).decode(tokens[~mask].tolist(), skip_special=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nwhat is the colour?<|im_end|>\n"
        "<|im_start|>assistant\n\n"
    )
    assert report.num_supervised_tokens == mask.sum() > 0
    assert report.num_tokens == report.longest_tokens == len(tokens)


def answer(content, **fields):
    return {"role": "assistant", "content": content, **fields}


@pytest.mark.parametrize(
    ("turns", "supervised"),
    [
        # Every trained turn, and none of weight 0.
        (
            [QUESTION, answer("one", weight=1), QUESTION, answer("two", weight=0), QUESTION, answer("")],
            "one<|im_end|><|im_end|>",
        ),
        # From the first word where the assistant opens.
        ([answer("hello"), QUESTION, answer("bye")], "hello<|im_end|>bye<|im_end|>"),
        # Marks inside an answer do not end it.
        ([QUESTION, answer("write <|im_end|>\n to stop")], "write <|im_end|>\n to stop<|im_end|>"),
    ],
)
def test_the_turns_of_the_assistant_are_supervised(tmp_path, base, turns, supervised):
    rows, _ = prepare(tmp_path, base, turns)
    assert supervised_text(rows, 0, base) == supervised


def test_rows_keep_the_order_and_the_line_numbers_of_the_file(tmp_path, base):
    path = tmp_path / "rows.jsonl"
    lines = [
        json.dumps({"messages": [QUESTION, {"role": "assistant", "content": f"n{n}"}]}) for n in range(600)
    ]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode() + b"\r\n\r\n")
    rows, report = prepare_rows(path, base, max_length=256, too_long="error", purpose="training")
    assert rows.lines.tolist() == list(range(1, 601))
    assert report.num_rows == 600
    assert supervised_text(rows, 417, base) == "n417<|im_end|>"


LONG = [QUESTION, {"role": "assistant", "content": "the same " * 60}]
LATE = [{"role": "user", "content": "the same " * 60}, ANSWER]
SHORT = [QUESTION, ANSWER]


def test_a_long_row_is_an_error_that_names_line_tokens_and_limit(tmp_path, base):
    with pytest.raises(InvalidTrainingFileError) as caught:
        prepare(tmp_path, base, SHORT, LONG, max_length=100)
    assert caught.value.param == "training_file"
    message = caught.value.message
    assert message.startswith("The training file has 1 fault. Line 2: The row has ")
    assert "more than the 100 allowed" in message
    assert "training.too_long" in message


def test_a_long_row_is_cut_to_its_beginning_when_asked(tmp_path, base):
    whole, _ = prepare(tmp_path, base, LONG)
    cut, report = prepare(tmp_path, base, SHORT, LONG, max_length=100, too_long="truncate")
    assert cut.row(1)[0].tolist() == whole.row(0)[0][:100].tolist()
    assert (report.num_rows, report.num_truncated, report.truncated_lines) == (2, 1, (2,))
    assert report.longest_tokens == 100


def test_a_long_row_is_left_out_when_asked(tmp_path, base):
    rows, report = prepare(tmp_path, base, SHORT, LONG, SHORT, max_length=100, too_long="drop")
    assert rows.lines.tolist() == [1, 3]
    assert (report.num_dropped, report.dropped_lines) == (1, (2,))


@pytest.mark.parametrize(
    ("rows", "options", "reported"),
    [
        (
            [LATE],
            {"max_length": 100, "too_long": "truncate"},
            "training file .* Line 1: Cut to 100 tokens, nothing of the row",
        ),
        ([LONG, LONG], {"max_length": 50, "too_long": "drop"}, "no row left: all 2 are longer"),
        ([], {"purpose": "validation"}, "validation file is empty"),
    ],
)
def test_a_file_of_which_nothing_is_left_is_refused(tmp_path, base, rows, options, reported):
    with pytest.raises((InvalidTrainingFileError, InvalidValidationFileError), match=reported) as caught:
        prepare(tmp_path, base, *rows, **options)
    assert caught.value.param == f"{options.get('purpose', 'training')}_file"


def test_a_row_without_any_trained_token_is_a_fault_of_its_line(tmp_path, base):
    silent = [QUESTION, {**ANSWER, "weight": 0}]
    with pytest.raises(InvalidValidationFileError) as caught:
        prepare(tmp_path, base, SHORT, silent, purpose="validation")
    assert caught.value.param == "validation_file"
    assert "Line 2, messages: No token of the row is trained" in caught.value.message


def test_all_faults_are_counted_and_the_first_few_reported(tmp_path, base):
    silent = [QUESTION, {**ANSWER, "weight": 0}]
    with pytest.raises(InvalidTrainingFileError) as caught:
        prepare(tmp_path, base, *[silent] * 300)
    assert caught.value.message.startswith("The training file has 300 faults. Line 1, messages:")
    assert "Line 5," in caught.value.message
    assert "Line 6," not in caught.value.message


def test_a_line_that_broke_since_the_upload_is_a_fault_of_its_line(tmp_path, base):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"messages": SHORT}) + "\n{}\n")
    with pytest.raises(InvalidTrainingFileError, match="Line 2, messages"):
        prepare_rows(path, base, max_length=256, too_long="error", purpose="training")


@pytest.mark.parametrize(
    ("template", "reported"),
    [
        (
            # Like templates that take the reasoning out of all turns but the last.
            "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last %}<think>{% endif %}"
            "{{ m.content }}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
            "Line 1, messages[1]: The base's chat template renders this assistant message differently",
        ),
        (
            "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"
            "{% if add_generation_prompt %}assistant:{% endif %}",
            "Line 1, messages[1]: The base's chat template closes this assistant message with none",
        ),
        (
            "{% if messages | length > 2 %}{{ raise_exception('one turn only') }}{% endif %}",
            "Line 1, messages: The base's chat template refuses these messages: one turn only",
        ),
    ],
)
def test_what_the_template_can_not_do_is_a_fault_of_the_row(tmp_path, template, reported):
    base = build_tiny_base(tmp_path / "base")
    (base / "chat_template.jinja").write_text(template)
    with pytest.raises(InvalidTrainingFileError) as caught:
        prepare(tmp_path, base, [QUESTION, ANSWER, QUESTION, ANSWER])
    assert reported in caught.value.message


TEMPLATES = {
    "marks": "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "trimmed": "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}",
    "an empty thought": "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think></think>{% endif %}",
    "a thought for some": "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and messages[0].role == 'system' %}<think></think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if messages[0].role == 'system' %}<think></think>{% endif %}{% endif %}",
}
TALKS = [
    [QUESTION, ANSWER],
    [QUESTION, {"role": "assistant", "content": ""}],
    [QUESTION, {"role": "assistant", "content": " <|im_start|>assistant\n twice <|im_start|>assistant\n "}],
    [{"role": "user", "content": "[assistant] blue <|im_end|>"}, {"role": "assistant", "content": " blue "}],
    [{"role": "system", "content": "s"}, QUESTION, ANSWER],
    [{"role": "system", "content": "s"}, QUESTION, {"role": "assistant", "content": "<think></think>x"}],
    [QUESTION, ANSWER, {"role": "user", "content": "<|im_start|>assistant\nblue"}, ANSWER],
    [ANSWER, QUESTION, ANSWER],
]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_trained_turn_is_found_where_it_stands_or_refused(name):
    template = ChatTemplate(TEMPLATES[name])
    for talk in TALKS:
        turns = read_line(FORMAT, json.dumps({"messages": talk}).encode()).turns
        try:
            text, spans, *_ = render_turns(template, turns)
        except InvalidValueError as error:
            assert error.param.startswith("messages")
            continue
        assert [span.message for span in spans] == [n for n, turn in enumerate(turns) if turn.is_trained]
        for span in spans:
            assert turns[span.message].content.strip() in text[span.start : span.end]


def test_a_template_that_reorders_is_served_by_weight_0_on_earlier_answers(tmp_path):
    base = build_tiny_base(tmp_path / "base")
    (base / "chat_template.jinja").write_text(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if loop.last and m.role == 'assistant' %}<think>{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    rows, _ = prepare(tmp_path, base, [QUESTION, {**ANSWER, "weight": 0}, QUESTION, ANSWER])
    assert supervised_text(rows, 0, base) == f"<think>{ANSWER['content']}<|im_end|>"


def test_a_row_is_named_by_prepare_as_at_upload_where_rows_are_no_lines(tmp_path, base):
    good = {"messages": [QUESTION, ANSWER]}
    untrained = {"messages": [QUESTION, ANSWER | {"weight": 0}]}
    path = tmp_path / "rows"
    options = {"max_length": 256, "too_long": "error", "purpose": "training"}
    path.write_text("[\n\n" + json.dumps(good) + ",\n" + json.dumps(untrained) + "]")
    with pytest.raises(InvalidTrainingFileError, match=r"1 fault\. Row 2 \(line 4\), messages: "):
        prepare_rows(path, base, **options)
    pq.write_table(pa.Table.from_pylist([good, untrained]), path)
    with pytest.raises(InvalidTrainingFileError, match=r"1 fault\. Row 2, messages: "):
        prepare_rows(path, base, **options)
