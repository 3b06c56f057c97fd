"""Holding rows back for validation by their content, so that the same file is always split the same way."""

import hashlib

from luthier.core.errors import InvalidTrainingFileError
from luthier.data.prepared import PreparedRows


def split_rows(rows: PreparedRows, share: float) -> tuple[PreparedRows, PreparedRows]:
    """Split rows into those to train on and those held back.

    The rows with the smallest content hashes are held back. Equal rows stay together, or the validation
    loss would be measured on rows that were trained on.

    Args:
        rows: the rows, of any order.
        share: of rows to hold back, above 0 and at most 0.5; at least one row is held back.

    Returns:
        The training rows and the validation rows, each in the order of `rows`.

    Raises:
        InvalidTrainingFileError: when there are no two different rows to divide (param `training_file`).
    """
    hashes = [_row_hash(rows, index) for index in range(rows.num_rows)]
    num_wanted = max(1, round(share * rows.num_rows))
    order = sorted(range(rows.num_rows), key=lambda index: hashes[index])
    held_back = {hashes[index] for index in order[:num_wanted]}
    validation = [index for index in range(rows.num_rows) if hashes[index] in held_back]
    training = [index for index in range(rows.num_rows) if hashes[index] not in held_back]
    if not training or not validation:
        raise InvalidTrainingFileError(
            f"The training file has too few different rows ({len(set(hashes))}) to hold back a share of "
            f"{share:g}. Add rows, lower training.validation_split, or send a validation_file.",
            param="training_file",
        )
    return rows.select(training), rows.select(validation)


def _row_hash(rows: PreparedRows, index: int) -> bytes:
    tokens, supervised = rows.row(index)
    return hashlib.sha256(tokens.tobytes() + supervised.tobytes()).digest()
