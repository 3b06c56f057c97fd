"""The order of rows, the parts of a step, and the tensors of a part."""

import numpy as np
import pytest
import torch

from luthier.data.prepare.batch_plan import make_plan, order_epoch, split_micro
from luthier.training.model.batches import collate, count_supervised
from tests.tiny import build_tiny_rows

LENGTHS = np.random.default_rng(0).integers(5, 300, 103)


def test_every_epoch_holds_every_row_once_in_batches_of_the_asked_size():
    plan = make_plan(LENGTHS, batch_size=8, num_epochs=3, seed=1)
    assert plan.steps_per_epoch == 13
    assert plan.num_steps == 39
    for epoch in range(3):
        batches = plan.steps[epoch * 13 : (epoch + 1) * 13]
        assert sorted(np.concatenate(batches)) == list(range(103))
        assert sorted(map(len, batches)) == [7] + [8] * 12


def test_the_order_depends_on_seed_and_epoch_alone():
    def flat(seed: int, epoch: int) -> list[int]:
        return [int(row) for batch in order_epoch(LENGTHS, 8, seed, epoch) for row in batch]

    assert flat(1, 0) == flat(1, 0)
    assert flat(1, 0) != flat(1, 1)
    assert flat(1, 0) != flat(2, 0)
    longer = make_plan(LENGTHS, batch_size=8, num_epochs=5, seed=1)
    shorter = make_plan(LENGTHS, batch_size=8, num_epochs=2, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(longer.steps, shorter.steps, strict=False))


def test_rows_of_like_length_share_a_batch():
    def padded(batches: list[np.ndarray]) -> int:
        return sum(len(batch) * int(LENGTHS[batch].max()) for batch in batches)

    shuffled = np.random.default_rng(1).permutation(103)
    at_random = [shuffled[i : i + 8] for i in range(0, 103, 8)]
    assert padded(order_epoch(LENGTHS, 8, 1, 0)) < 1.15 * LENGTHS.sum() < padded(at_random)


def test_parts_hold_every_row_of_the_step_within_the_bound():
    rows = np.arange(40)
    parts = split_micro(rows, LENGTHS, 600)
    assert sorted(np.concatenate(parts)) == list(rows)
    assert len(parts) > 1
    assert all(len(part) * LENGTHS[part].max() <= 600 for part in parts)


def test_a_row_over_the_bound_is_a_part_of_its_own():
    parts = split_micro(np.array([0, 1, 2]), np.array([10, 900, 10]), 600)
    assert [part.tolist() for part in parts] == [[0, 2], [1]]


def test_tensors_hold_the_rows_and_padding_is_never_supervised():
    rows = build_tiny_rows(5)
    batch = collate(rows, np.array([3, 1]), pad_id=2)
    tokens, supervised = rows.row(3)
    assert batch.token_ids_BT.dtype == torch.int64
    assert batch.token_ids_BT[0, : len(tokens)].tolist() == tokens.tolist()
    assert batch.supervised_BT[0, : len(tokens)].tolist() == supervised.tolist()
    for i, row in enumerate((3, 1)):
        end = len(rows.row(row)[0])
        assert not batch.supervised_BT[i, end:].any()
        assert (batch.token_ids_BT[i, end:] == 2).all()
    assert batch.num_tokens == len(rows.row(3)[0]) + len(rows.row(1)[0])


@pytest.mark.parametrize("first_is_supervised", [True, False])
def test_a_rows_first_token_is_never_counted(first_is_supervised):
    rows = build_tiny_rows(3)
    expected = [int(rows.row(i)[1].sum()) for i in range(3)]
    rows.supervised[rows.offsets[:-1]] = first_is_supervised
    assert count_supervised(rows).tolist() == expected
    assert int(collate(rows, np.arange(3), 0).supervised_BT.sum()) == sum(expected)
