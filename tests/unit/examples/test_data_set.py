"""The bundled data set: what the files promise about themselves and each other."""

import json

import pytest

from examples.support import generate
from examples.support.generate import FOLDER, NUM_ROWS, SYSTEM, Row, make_data_set
from examples.support.score import ALLOWED, KEYS, parse_answer
from luthier.data.readers.base import Limits
from luthier.data.readers.file_checker import check_rows
from tests.rows import runs_of_six, words_of

FILES = ("train", "validation", "heldout")


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Row]]:
    return make_data_set()


def _messages(rows: list[Row]) -> list[str]:
    return [row.message for row in rows]


@pytest.mark.parametrize("name", FILES)
def test_the_committed_file_is_what_the_generator_writes(rows, name):
    committed = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8")
    assert committed == "".join(f"{row.to_line()}\n" for row in rows[name])


def test_the_generator_is_repeatable_and_its_seed_matters(rows):
    assert make_data_set() == rows
    assert make_data_set(generate.SEED + 1)["train"] != rows["train"]


@pytest.mark.parametrize("name", FILES)
def test_the_service_accepts_every_file(name):
    content = (FOLDER / f"{name}.jsonl").read_bytes()
    assert check_rows([content], Limits(1024 * 1024)).num_rows == NUM_ROWS[name]


def test_there_are_enough_rows():
    assert NUM_ROWS["train"] >= 240
    assert NUM_ROWS["heldout"] >= 60


def test_heldout_rows_share_no_name_instrument_or_sentence_with_the_others(rows):
    known, heldout = rows["train"] + rows["validation"], rows["heldout"]
    assert not {row.name for row in known} & {row.name for row in heldout}
    known_things = {word for row in known for word in row.thing.split()}
    assert not known_things & {word for row in heldout for word in row.thing.split()}
    sentences = [{text for row in some for text in row.sentences} for some in (known, heldout)]
    assert sentences[0].isdisjoint(sentences[1])


def test_heldout_messages_share_no_run_of_six_words_with_the_others(rows):
    heldout = runs_of_six(_messages(rows["heldout"]))
    assert len(heldout) > 500
    assert not heldout & runs_of_six(_messages(rows["train"] + rows["validation"]))


def test_no_message_comes_twice_and_validation_customers_are_not_in_training(rows):
    messages = [message for name in FILES for message in _messages(rows[name])]
    assert len(set(messages)) == len(messages)
    assert not {row.name for row in rows["train"]} & {row.name for row in rows["validation"]}


@pytest.mark.parametrize("name", FILES)
def test_every_reference_is_valid_and_answers_its_own_message(rows, name):
    for row in rows[name]:
        answer = parse_answer(row.answer)
        assert row.name in answer["reply"] and row.name in row.message and row.thing in row.message
        assert answer["reply"].endswith(". Warmly, the bench")
        assert len(answer["reply"].split()) <= 15 and "\n" not in answer["reply"]


@pytest.mark.parametrize("name", ("train", "heldout"))
def test_every_value_of_every_label_is_there_about_equally_often(rows, name):
    for key, allowed in ALLOWED.items():
        found = [json.loads(row.answer)[key] for row in rows[name]]
        assert set(found) == allowed
        fair = len(found) / len(allowed)
        assert all(0.5 * fair <= found.count(value) <= 1.5 * fair for value in allowed)


def test_the_system_turn_says_nothing_of_the_structure():
    # "return" is left out: no key, and too common a word to prove anything.
    secret = {*KEYS, *(value for allowed in ALLOWED.values() for value in allowed), "json", "object"}
    assert not set(words_of(SYSTEM)) & secret
