"""The tasks of the quality measurement: held-out rows give nothing away that training rows say."""

import json
from pathlib import Path

import jsonschema
import pytest

from benchmarks.quality import orders_words, routing_words
from benchmarks.quality.e2e import load_e2e
from benchmarks.quality.orders import make_orders
from benchmarks.quality.routing import make_routing
from benchmarks.quality.routing_words import DESKS
from benchmarks.quality.scores import ORDER_SCHEMA
from benchmarks.quality.task import Row, Task, with_examples
from luthier.data.readers.base import Limits
from luthier.data.readers.file_checker import check_rows
from tests.rows import runs_of_six

_NUM_ROWS, _NUM_QUESTIONS = 500, 200


@pytest.fixture(scope="module", params=[make_routing, make_orders], ids=["routing", "orders"])
def task(request: pytest.FixtureRequest) -> Task:
    made: Task = request.param(_NUM_ROWS, _NUM_QUESTIONS)
    return made


def test_a_task_is_the_same_every_time(task):
    make = {"routing": make_routing, "orders": make_orders}[task.name]
    again = make(_NUM_ROWS, _NUM_QUESTIONS)
    assert (again.rows, again.questions) == (task.rows, task.questions)


def test_a_smaller_measurement_asks_the_same_questions_first():
    assert make_orders(20, 8).questions == make_orders(500, 200).questions[:8]


def test_rows_and_questions_are_as_many_as_asked_for_and_all_different(task):
    assert len({row.prompt for row in task.rows}) == _NUM_ROWS
    assert len({question.prompt for question in task.questions}) == _NUM_QUESTIONS


def test_held_out_rows_share_no_run_of_six_words_with_training_rows(task):
    training = runs_of_six([row.prompt[-1][1] for row in task.rows])
    held_out = runs_of_six([question.prompt[-1][1] for question in task.questions])
    assert not training & held_out


@pytest.mark.parametrize("words", [routing_words, orders_words], ids=["routing", "orders"])
def test_held_out_word_lists_share_no_entry_with_those_of_training(words):
    training, held_out = words.TRAINING, words.HELDOUT  # type: ignore[attr-defined]
    for name in vars(training):
        if name in {"topics", "date_forms"}:
            continue
        shared = (set(getattr(training, name)) & set(getattr(held_out, name))) - {""}
        assert not shared, name


def test_held_out_things_and_faults_are_new_words():
    for desk in DESKS:
        known, new = routing_words.TRAINING.topics[desk], routing_words.HELDOUT.topics[desk]
        assert not set(known.things) & set(new.things)
        assert not set(known.faults) & set(new.faults)
        # A thing's last word says what it is.
        assert not {thing.split()[-1] for thing in known.things} & {thing.split()[-1] for thing in new.things}


def test_no_report_spells_a_desks_name():
    made = make_routing(_NUM_ROWS, _NUM_QUESTIONS)
    texts = [turns.prompt[-1][1].lower() for turns in (*made.rows, *made.questions)]
    assert not [text for text in texts if any(desk in text for desk in DESKS)]


def test_all_desks_come_equally_often():
    counted = [sum(row.answer == desk for row in make_routing(400, 8).rows) for desk in DESKS]
    assert counted == [50] * len(DESKS)


def test_every_order_fits_the_schema_and_says_only_what_the_letter_says():
    made = make_orders(_NUM_ROWS, _NUM_QUESTIONS)
    pairs = [(row.prompt, row.answer) for row in made.rows]
    pairs += [(question.prompt, question.references[0]) for question in made.questions]
    for prompt, answer in pairs:
        order = json.loads(answer)
        jsonschema.validate(order, ORDER_SCHEMA)
        letter = prompt[-1][1]
        for name in ("customer", "colour", "note"):
            assert order.get(name, "") in letter
        assert f"{order['unit_price']:.2f}" in letter or f"{order['unit_price']}" in letter
        assert order["deliver_on"][:4] in letter


def test_optional_members_come_in_some_orders_and_not_in_others():
    orders = [json.loads(row.answer) for row in make_orders(_NUM_ROWS, 1).rows]
    for name in ("colour", "note"):
        assert 0.25 < sum(name in order for order in orders) / len(orders) < 0.55


def test_the_service_accepts_the_training_rows(task):
    content = "".join(f"{row.to_line()}\n" for row in task.rows).encode()
    assert check_rows([content], Limits(1024 * 1024)).num_rows == _NUM_ROWS


def test_examples_come_as_earlier_turns_under_one_system_turn():
    example = Row((("system", "s"), ("user", "q1")), "a1")
    assert with_examples((("system", "s"), ("user", "q2")), [example]) == (
        ("system", "s"),
        ("user", "q1"),
        ("assistant", "a1"),
        ("user", "q2"),
    )
    assert with_examples((("user", "q2"),), []) == (("user", "q2"),)


def _write_e2e(folder: Path, name: str, pairs: list[tuple[str, str]]) -> None:
    lines = [Row((("user", facts),), text).to_line() for facts, text in pairs]
    (folder / name).write_text("".join(f"{line}\n" for line in lines))


def test_e2e_keeps_all_references_and_asks_nothing_that_was_trained(tmp_path):
    _write_e2e(tmp_path, "dev.jsonl", [("a", "a1"), ("a", "a2"), ("b", "b1")])
    _write_e2e(tmp_path, "test.jsonl", [("a", "seen"), ("c", "c1"), ("c", "c2")])
    made = load_e2e(tmp_path, 10, 10)
    assert sorted(row.prompt[-1][1] for row in made.rows) == ["a", "b"]
    assert [(q.prompt[-1][1], q.references) for q in made.questions] == [("c", ("c1", "c2"))]


def test_without_its_files_there_is_no_e2e_task(tmp_path):
    assert load_e2e(tmp_path, 10, 10) is None
