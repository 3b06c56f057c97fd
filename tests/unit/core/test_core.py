"""States, ids, keys, specs and settings."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from luthier.core.errors import InvalidTransitionError
from luthier.core.events import StepEvent, parse_event
from luthier.core.ids import (
    PREFIXES,
    hash_api_key,
    is_well_formed,
    key_prefix,
    new_api_key,
    new_id,
    new_model_suffix,
)
from luthier.core.states import TERMINAL_STATUSES, TRANSITIONS, JobStatus, check_transition


def test_exactly_the_tables_transitions_are_allowed():
    for source, target in itertools.product(JobStatus, JobStatus):
        if target in TRANSITIONS[source]:
            check_transition(source, target)
        else:
            with pytest.raises(InvalidTransitionError, match=target.value):
                check_transition(source, target)


def test_ended_is_ended():
    assert {status.value for status in TERMINAL_STATUSES} == {"succeeded", "failed", "cancelled"}
    assert all(status.is_terminal == (status in TERMINAL_STATUSES) for status in JobStatus)


def test_ids_have_their_kind_and_sort_by_creation():
    for kind, prefix in PREFIXES.items():
        made = [new_id(kind) for _ in range(100)]
        assert all(value.startswith(prefix) for value in made)
        assert sorted(made) == made
        assert len(set(made)) == 100
    assert len(new_model_suffix()) == 8


def test_a_fresh_key_is_well_formed_and_hashes_to_something_else():
    key = new_api_key()
    assert is_well_formed(key)
    assert key.startswith(key_prefix(key))
    assert hash_api_key(key) != key
    assert new_api_key() != key


@given(position=st.integers(0, 60), letter=st.sampled_from("abc019_"))
def test_a_mistyped_key_is_recognised_without_a_query(position, letter):
    key = new_api_key()
    wrong = key[:position] + letter + key[position + 1 :]
    assert is_well_formed(wrong) == (wrong == key)


@pytest.mark.parametrize("text", ["", "sk-abc", "lt_", "lt__", "lt_a_b", "lt_12345678_short", "ü" * 61])
def test_what_is_no_key_is_refused(text):
    assert not is_well_formed(text)


def test_an_event_line_with_a_number_that_is_none_is_refused():
    line = (
        '{"type":"step","job_id":"j","step":1,"total_steps":2,"epoch":0.5,"metrics":{"train_loss":1.5},'
        '"learning_rate":0.1,"grad_norm":%s,"num_tokens":3,"num_supervised_tokens":2,'
        '"tokens_per_second":1.0,"seconds_left":1.0,"peak_memory_bytes":5}'
    )
    event = parse_event(line % "0.5")
    assert isinstance(event, StepEvent)
    assert event.metrics.train_loss == 1.5
    for bad in ("NaN", "Infinity", '"x"'):
        with pytest.raises(ValidationError):
            parse_event(line % bad)
