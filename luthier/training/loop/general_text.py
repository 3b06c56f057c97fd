"""The bundled general text, on which forgetting is measured: prose of several registers, written for this.

A blank line ends a passage. The text is part of what reported numbers mean: changing it changes them.
"""

from functools import cache
from pathlib import Path

import numpy as np

from luthier.data.prepare.prepared_rows import PreparedRows, join_rows
from luthier.data.rendering.tokenizer import Tokenizer

_PATH = Path(__file__).with_name("general_text.txt")
# Enough for any passage; a base with a shorter context reads them in pieces.
_MAX_ROW_TOKENS = 128


@cache
def general_passages() -> list[str]:
    """Return the passages, in file order."""
    return _PATH.read_text(encoding="utf-8").strip().split("\n\n")


def general_rows(tokenizer: Tokenizer, room: int) -> PreparedRows:
    """Turn the passages into rows, which begin as raw text does; all tokens but the first are predicted.

    Args:
        room: tokens that a row may have; longer passages are cut into several rows.

    Returns:
        The rows; their lines are the passages' numbers, from 1.
    """
    prefix = np.asarray(tokenizer.raw_prefix_ids, np.int32)
    limit = max(2, min(_MAX_ROW_TOKENS, room) - len(prefix))
    tokens, lines = [], []
    for number, encoding in enumerate(tokenizer.encode_batch(general_passages()), start=1):
        for start in range(0, len(encoding.ids), limit):
            piece = encoding.ids[start : start + limit]
            if len(piece) > 1:
                tokens.append(np.concatenate([prefix, piece]))
                lines.append(number)
    return join_rows(tokens, [np.arange(len(row)) > 0 for row in tokens], lines)
