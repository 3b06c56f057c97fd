import numpy as np
import pytest
from safetensors.numpy import save_file

from luthier.data.prepare.prepared_rows import join_rows, read_prepared, write_prepared
from luthier.data.prepare.validation_split import split_rows


def rows_of(*contents):
    tokens = [np.asarray(content, dtype=np.int32) for content in contents]
    masks = [np.arange(len(content)) % 2 == 1 for content in contents]
    return join_rows(tokens, masks, list(range(1, len(contents) + 1)))


def texts_of(rows):
    return {tuple(rows.row(i)[0]) for i in range(rows.num_rows)}


def test_rows_come_back_from_disk_as_they_were(tmp_path):
    rows = rows_of([1, 2, 3], [4, 5], [6, 7, 8, 9])
    write_prepared(rows, tmp_path / "train.safetensors")
    back = read_prepared(tmp_path / "train.safetensors")
    types = {"tokens": "int32", "supervised": "bool", "offsets": "int64", "lines": "int32"}
    for name, dtype in types.items():
        assert getattr(back, name).dtype == dtype
        np.testing.assert_array_equal(getattr(back, name), getattr(rows, name))
    assert [path.name for path in tmp_path.iterdir()] == ["train.safetensors"]


def test_arrays_that_do_not_fit_together_are_refused(tmp_path):
    path = tmp_path / "train.safetensors"
    arrays = {"tokens": np.zeros(3, np.int32), "supervised": np.zeros(3, np.bool_)}
    save_file(arrays | {"offsets": np.asarray([0, 4], np.int64), "lines": np.ones(1, np.int32)}, path)
    with pytest.raises(ValueError, match="do not fit together"):
        read_prepared(path)


def test_selected_rows_keep_tokens_mask_and_line():
    chosen = rows_of([1, 2, 3], [4, 5], [6, 7, 8, 9]).select([2, 0])
    assert chosen.row(0)[0].tolist() == [6, 7, 8, 9]
    assert chosen.row(1)[1].tolist() == [False, True, False]
    assert chosen.lines.tolist() == [3, 1]
    assert chosen.lengths.tolist() == [4, 3]


def test_a_split_gives_every_row_to_one_side_and_the_share_to_validation_in_any_order():
    contents = [[n, n + 1] for n in range(50)]
    training, validation = split_rows(rows_of(*contents), 0.2)
    assert validation.num_rows == 10
    assert sorted([*training.lines, *validation.lines]) == list(range(1, 51))
    _, again = split_rows(rows_of(*reversed(contents)), 0.2)
    assert texts_of(validation) == texts_of(again)


def test_equal_rows_stay_on_one_side():
    training, validation = split_rows(rows_of(*[[n % 5, 1] for n in range(40)]), 0.2)
    assert not texts_of(training) & texts_of(validation)


def test_the_smallest_share_holds_back_one_row():
    _, validation = split_rows(rows_of(*[[n, 1] for n in range(12)]), 0.001)
    assert validation.num_rows == 1
