"""The validation split, by the content of rows: the same file is always split the same way."""

import hashlib

import numpy as np
import numpy.typing as npt

from luthier.core.errors import InvalidTrainingFileError
from luthier.data.prepare.grouping import find_roots, group_beside_template, group_near, join
from luthier.data.prepare.prepared_rows import PreparedRows

# A group of at least this many rows that fits on no side of the split is taken to be of one template.
_MIN_TEMPLATE_ROWS = 32


def split_rows(
    rows: PreparedRows, share: float, *, rows_per_example: int = 1
) -> tuple[PreparedRows, PreparedRows]:
    """Split rows into those to train on and those held back.

    Equal rows and near-duplicates (where the rows have signatures) are a group and stay together, or the
    validation loss would be measured on rows that were trained on. The groups with the smallest content
    hashes are held back, as far as they fit into the share. Where no group fits because hundreds of rows
    come from one template, such rows are compared without the template's part.

    Args:
        share: of rows to hold back, above 0 and at most 0.5; at least one group is held back.
        rows_per_example: consecutive rows that are one example and stay together.

    Returns:
        The training rows and the validation rows, each in the order of `rows`.

    Raises:
        InvalidTrainingFileError: when there are fewer than two different groups (param `training_file`).
    """
    num_examples = rows.num_rows // rows_per_example
    num_wanted = max(1, round(share * num_examples))
    hashes = [
        _hash(rows, range(rows_per_example * one, rows_per_example * (one + 1)))
        for one in range(num_examples)
    ]
    labels = np.arange(num_examples)
    # All rows of an example have its signature.
    signatures = None if rows.signatures is None else rows.signatures[::rows_per_example]
    if signatures is not None:
        labels = group_near(signatures)
    groups = _list_groups(labels, hashes)
    if signatures is not None and min(map(len, groups)) > 2 * num_wanted:
        groups = _list_groups(_split_templates(signatures, groups, num_wanted), hashes)
    if len(groups) < 2:
        raise InvalidTrainingFileError(
            f"The training file has too few different rows ({len(groups)}, near-duplicates being one) to "
            f"hold back a share of {share:g}. Add rows, lower training.validation_split, or send a "
            "validation_file.",
            param="training_file",
        )
    held_back = set(_choose(groups, num_wanted))
    validation = [row for row in range(rows.num_rows) if row // rows_per_example in held_back]
    training = [row for row in range(rows.num_rows) if row // rows_per_example not in held_back]
    return rows.select(training), rows.select(validation)


def _choose(groups: list[list[int]], num_wanted: int) -> list[int]:
    """Return the examples of the first groups that fit; of the smallest group where none does."""
    chosen: list[int] = []
    for group in groups:
        if len(chosen) + len(group) <= num_wanted:
            chosen += group
    return chosen or min(groups, key=len)


def _split_templates(
    signatures: npt.NDArray[np.uint32], groups: list[list[int]], num_wanted: int
) -> npt.NDArray[np.int64]:
    """Return the rows' groups with the too large ones divided, int64 [N]."""
    labels = np.zeros(len(signatures), np.int64)
    first_label = 0
    for group in groups:
        parts = np.zeros(len(group), np.int64)
        if len(group) >= max(_MIN_TEMPLATE_ROWS, num_wanted):
            parts = group_beside_template(signatures[group])
        labels[group] = first_label + parts
        first_label += len(group)
    return labels


def _list_groups(labels: npt.NDArray[np.int64], hashes: list[bytes]) -> list[list[int]]:
    """Return the rows' numbers in groups, by the smallest content hash of each group."""
    # Rows of different texts may be equal once they are cut: their groups are one.
    parents = np.arange(labels.max() + 1)
    first_label: dict[bytes, int] = {}
    for row_hash, label in zip(hashes, labels.tolist(), strict=True):
        join(parents, first_label.setdefault(row_hash, label), label)
    members: dict[int, list[int]] = {}
    for index, root in enumerate(find_roots(parents)[labels].tolist()):
        members.setdefault(root, []).append(index)
    return sorted(members.values(), key=lambda group: min(hashes[index] for index in group))


def _hash(rows: PreparedRows, indices: range) -> bytes:
    found = hashlib.sha256()
    for index in indices:
        tokens, supervised = rows.row(index)
        found.update(tokens.tobytes() + supervised.tobytes())
    return found.digest()
