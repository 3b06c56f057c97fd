"""Prepared rows: tokens and mask of a file as flat arrays, mapped and as one safetensors file."""

import json
import os
import tempfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

_DTYPES = {"int64": "I64", "int32": "I32", "bool": "BOOL"}
_WRITTEN_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class PreparedRows:
    """Rows one after the other: row `i` is `tokens[offsets[i]:offsets[i + 1]]`.

    `tokens` int32 [total], `supervised` bool [total], `offsets` int64 [N+1],
    `lines` int32 [N] (each row's line in its file, from 1). `signatures` uint32 [N, K] (see
    luthier.data.prepare.minhash) exist only until rows are split, and are not written to disk.
    """

    tokens: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    offsets: npt.NDArray[np.int64]
    lines: npt.NDArray[np.int32]
    signatures: npt.NDArray[np.uint32] | None = None

    @property
    def num_rows(self) -> int:
        return len(self.lines)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_supervised_tokens(self) -> int:
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
        writer = RowWriter()
        for index in indices:
            writer.add(*self.row(index), int(self.lines[index]))
        return writer.finish(None if self.signatures is None else self.signatures[list(indices)])


class RowWriter:
    """Collects rows; tokens and masks are in unnamed files, so that memory holds 12 bytes a row."""

    def __init__(self) -> None:
        self._tokens = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the rows are
        self._supervised = tempfile.TemporaryFile()  # noqa: SIM115
        self._ends, self._lines = array("q", [0]), array("i")

    @property
    def num_rows(self) -> int:
        return len(self._lines)

    @property
    def num_tokens(self) -> int:
        return self._ends[-1]

    def add(self, tokens: npt.NDArray[np.int32], supervised: npt.NDArray[np.bool_], line: int) -> None:
        """Add a row: its tokens, int32 [T], its mask, bool [T], and its line from 1."""
        self._tokens.write(np.ascontiguousarray(tokens, np.int32).data)
        self._supervised.write(np.ascontiguousarray(supervised, np.bool_).data)
        self._ends.append(self._ends[-1] + len(tokens))
        self._lines.append(line)

    def finish(self, signatures: npt.NDArray[np.uint32] | None = None) -> PreparedRows:
        """Return the rows; no more are added."""
        return PreparedRows(
            tokens=_mapped(self._tokens, np.int32),
            supervised=_mapped(self._supervised, np.bool_),
            offsets=np.array(self._ends, np.int64),
            lines=np.array(self._lines, np.int32),
            signatures=signatures,
        )


def _mapped(file: IO[bytes], dtype: Any) -> npt.NDArray[Any]:
    """Return a file's content as an array, read on demand."""
    file.flush()
    if file.tell() == 0:
        return np.zeros(0, dtype)
    return np.memmap(file, dtype, mode="r")


def join_rows(
    tokens: Sequence[npt.NDArray[np.int32]],
    supervised: Sequence[npt.NDArray[np.bool_]],
    lines: Sequence[int],
    signatures: Sequence[npt.NDArray[np.uint32]] | None = None,
) -> PreparedRows:
    """Join rows: of each its tokens, int32 [T], mask, bool [T], line, and signature, uint32 [K], if known."""
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
    """Write rows to a safetensors file that exists whole or not at all, without a copy in memory.

    The format: 8 bytes of length (little-endian), a header of that length in JSON, then the tensors, those of
    the larger alignment first (https://github.com/huggingface/safetensors, "Format"). An older file is
    replaced.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    arrays: dict[str, npt.NDArray[Any]] = {
        "offsets": rows.offsets,
        "tokens": rows.tokens,
        "lines": rows.lines,
        "supervised": rows.supervised,
    }
    header: dict[str, Any] = {}
    end = 0
    for name, values in arrays.items():
        place = [end, end := end + values.nbytes]
        header[name] = {"dtype": _DTYPES[values.dtype.name], "shape": [len(values)], "data_offsets": place}
    content = json.dumps(header).encode()
    content += b" " * (-len(content) % 8)
    with temporary.open("wb") as stream:
        stream.write(len(content).to_bytes(8, "little") + content)
        for values in arrays.values():
            for start in range(0, len(values), _WRITTEN_AT_ONCE):
                stream.write(np.ascontiguousarray(values[start : start + _WRITTEN_AT_ONCE]).data)
        stream.flush()
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
