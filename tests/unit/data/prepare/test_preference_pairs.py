"""Pairs of rows stay pairs, in plans and in parts."""

import numpy as np
import pytest

from luthier.data.prepare.preference_pairs import make_pair_plan, pair_lengths, rows_of_pairs, split_pairs

LENGTHS = np.random.default_rng(3).integers(5, 90, 2 * 23)


def pairs_of(rows: np.ndarray) -> list[int]:
    """Return the pairs that rows are of; fails when a pair's two rows are not beside each other."""
    assert (rows[0::2] % 2 == 0).all()
    assert (rows[1::2] == rows[0::2] + 1).all()
    return [int(row) // 2 for row in rows[0::2]]


def test_rows_of_pairs_have_the_preferred_one_first():
    assert rows_of_pairs(np.array([4, 0])).tolist() == [8, 9, 0, 1]


def test_a_pair_is_as_long_as_its_longer_row():
    assert pair_lengths(np.array([3, 9, 7, 2])).tolist() == [9, 7]


def test_every_epoch_has_every_pair_once_and_whole():
    plan = make_pair_plan(LENGTHS, batch_size=4, num_epochs=2, seed=5)
    assert plan.num_steps == 12
    for epoch in range(2):
        steps = plan.steps[6 * epoch : 6 * (epoch + 1)]
        assert sorted(pair for rows in steps for pair in pairs_of(rows)) == list(range(23))
        assert max(len(rows) for rows in steps) == 2 * 4


def test_epochs_have_orders_of_their_own():
    plan = make_pair_plan(LENGTHS, batch_size=4, num_epochs=2, seed=5)
    assert [rows.tolist() for rows in plan.steps[:6]] != [rows.tolist() for rows in plan.steps[6:]]


@pytest.mark.parametrize("max_tokens", [60, 200, 1000])
def test_parts_hold_whole_pairs_within_the_bound(max_tokens):
    rows = rows_of_pairs(np.array([22, 3, 7, 15, 0, 9]))
    parts = split_pairs(rows, LENGTHS, max_tokens)
    assert sorted(pair for part in parts for pair in pairs_of(part)) == [0, 3, 7, 9, 15, 22]
    for part in parts:
        assert len(part) == 2 or len(part) * int(LENGTHS[part].max()) <= max_tokens
