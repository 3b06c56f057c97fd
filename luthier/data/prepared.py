"""Prepared rows: tokens and mask of a file as flat arrays, in memory and as one safetensors file."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file


@dataclass(frozen=True, slots=True)
class PreparedRows:
    """Rows one after the other: row `i` is `tokens[offsets[i]:offsets[i + 1]]`.

    `tokens` int32 [total], `supervised` bool [total] (which tokens are learnt), `offsets` int64 [N+1],
    `lines` int32 [N] (each row's line in its file, from 1). `signatures` uint32 [N, K] (see
    luthier.data.near) are there only where rows are yet to be split, and are not written to disk.
    """

    tokens: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.int64]
    lines: npt.NDArray[np.int32]
    signatures: npt.NDArray[np.uint32] | None = None

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return len(self.lines)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all rows."""
        return len(self.tokens)

    @property
    def num_supervised_tokens(self) -> int:
        """Number of tokens that are learnt."""
        return int(self.supervised.sum())

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each row, int64 [N]."""
        return np.diff(self.offsets)

    def row(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]:
        """Return the tokens and the mask of one row, as views."""
        part = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.tokens[part], self.supervised[part]

    def select(self, indices: Sequence[int]) -> "PreparedRows":
        """Return the named rows, in the order named, as a copy."""
        rows = [self.row(index) for index in indices]
        return join_rows(
            [tokens for tokens, _ in rows],
            [mask for _, mask in rows],
            [int(self.lines[i]) for i in indices],
            None if self.signatures is None else [self.signatures[i] for i in indices],
        )


def join_rows(
    tokens: Sequence[npt.NDArray[np.int32]],
    supervised: Sequence[npt.NDArray[np.bool_]],
    lines: Sequence[int],
    signatures: Sequence[npt.NDArray[np.uint32]] | None = None,
) -> PreparedRows:
    """Lay rows one after the other.

    Args:
        tokens: of each row, int32 [T].
        supervised: of each row, bool [T].
        lines: of each row, from 1.
        signatures: of each row, uint32 [K], where they are known.

    Returns:
        The rows as flat arrays.
    """
    offsets = np.zeros(len(lines) + 1, dtype=np.int64)
    np.cumsum([len(row) for row in tokens], out=offsets[1:])
    return PreparedRows(
        tokens=np.concatenate([np.zeros(0, np.int32), *tokens]),
        supervised=np.concatenate([np.zeros(0, np.bool_), *supervised]),
        offsets=offsets,
        lines=np.asarray(lines, dtype=np.int32),
        signatures=np.stack(signatures) if signatures else None,
    )


def write_prepared(rows: PreparedRows, path: Path) -> None:
    """Write rows to a safetensors file that exists whole or not at all.

    Args:
        path: the file; an older one is replaced.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    arrays = {
        "tokens": rows.tokens,
        "supervised": rows.supervised,
        "offsets": rows.offsets,
        "lines": rows.lines,
    }
    save_file(arrays, temporary)
    # The library makes it private to its owner; the child may run as another user.
    temporary.chmod(0o644)
    with temporary.open("rb") as stream:
        os.fsync(stream.fileno())
    temporary.replace(path)


def read_prepared(path: Path) -> PreparedRows:
    """Read what write_prepared wrote.

    Raises:
        ValueError: when the arrays do not belong together.
    """
    arrays = load_file(path)
    rows = PreparedRows(**{name: arrays[name] for name in ("tokens", "supervised", "offsets", "lines")})
    fits = len(rows.offsets) == len(rows.lines) + 1 and rows.offsets[0] == 0
    if not fits or rows.offsets[-1] != len(rows.tokens) or len(rows.tokens) != len(rows.supervised):
        raise ValueError(f"{path.name}: the arrays of prepared rows do not fit together")
    return rows
