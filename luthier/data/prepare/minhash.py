"""MinHash signatures over the words of rows, by which near-duplicates are found.

Rows are near-duplicates when the sets of their word triples have a Jaccard similarity of about 0.7 or more,
estimated by the share of equal parts of their signatures. Source: A. Broder, On the resemblance and
containment of documents, 1997; the bands by which candidates are found: J. Leskovec, A. Rajaraman, J. Ullman,
Mining of Massive Datasets, 3.4. System turns are left out: they are the same in every row of a file.
"""

import json
import re
import zlib
from collections.abc import Sequence
from hashlib import blake2b
from itertools import chain

import numpy as np
import numpy.typing as npt

from luthier.data.formats.base import Row, Turn

SIGNATURE_PARTS = 64
NUM_BANDS = 16
# A pair of similarity 0.7 shares one of the bands with a chance of 98.8 %, one of 0.8 with 99.98 %.
BAND_PARTS = SIGNATURE_PARTS // NUM_BANDS
MIN_SIMILARITY = 0.7

_SHINGLE_WORDS = 3
# Words; of scripts without spaces each character is one.
_NO_SPACES = "\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\u0e00-\u0e7f"
_WORD = re.compile(rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]+")
# The same for ASCII, in a fifth of the time: other characters become spaces.
_ASCII_WORD_BYTES = bytes(
    ord(chr(byte).lower()) if byte < 128 and _WORD.fullmatch(chr(byte)) else ord(" ") for byte in range(256)
)
_MAX_CACHED_WORDS = 65536

Signatures = npt.NDArray[np.uint32]


class _WordHashes(dict[bytes, int]):
    """Hashes of words; the first 65,536 different ones are cached."""

    def __missing__(self, word: bytes) -> int:
        found = zlib.crc32(word)
        if len(self) < _MAX_CACHED_WORDS:
            self[word] = found
        return found


def _find_words(text: str) -> list[bytes]:
    """Return the words of a text, in lower case and UTF-8; the text itself where it has none."""
    if text.isascii():
        return text.encode().translate(_ASCII_WORD_BYTES).split() or [text.encode()]
    return [word.encode() for word in _WORD.findall(text.lower()) or [text]]


def row_text(row: Row) -> str:
    """Return the texts of a row that are compared: all but those of system turns."""
    turns = row.turns if row.rejected is None else chain(row.turns, row.rejected)
    return "\n".join(_turn_text(turn) for turn in turns if turn.role not in ("system", "developer"))


def _turn_text(turn: Turn) -> str:
    if not turn.tool_calls:
        return turn.content or ""
    calls = " ".join(f"{call.name} {json.dumps(call.arguments)}" for call in turn.tool_calls)
    return f"{turn.content or ''} {calls}"


def row_key(row: Row) -> int:
    """Return a 64-bit hash of a row's content."""
    parts: list[str] = []
    for turn in row.turns:
        parts += (turn.role, "+" if turn.is_trained else "-", turn.content or "")
        if turn.tool_calls or turn.name or turn.reasoning:
            parts.append(repr((turn.name, turn.reasoning, turn.tool_calls)))
    if row.tools or row.rejected is not None:
        parts.append(repr((row.tools, row.rejected)))
    return int.from_bytes(blake2b("\x1f".join(parts).encode(), digest_size=8).digest())


class Signer:
    """Makes signatures; those of any two signers of one version of Luthier are comparable."""

    def __init__(self) -> None:
        generator = np.random.default_rng(20110101)
        # Odd factors, so that each is a permutation of the 32-bit numbers.
        self._factors = (generator.integers(0, 2**32, SIGNATURE_PARTS, dtype=np.uint64) | 1).astype(np.uint32)
        self._summands = generator.integers(0, 2**32, SIGNATURE_PARTS, dtype=np.uint64).astype(np.uint32)
        self._hashes = _WordHashes()

    def sign(self, texts: Sequence[str]) -> Signatures:
        """Return the signatures of texts, uint32 [len(texts), SIGNATURE_PARTS]."""
        if not texts:
            return np.zeros((0, SIGNATURE_PARTS), np.uint32)
        find_hash = self._hashes.__getitem__
        words = [list(map(find_hash, _find_words(text))) for text in texts]
        for row in words:
            if len(row) < _SHINGLE_WORDS:
                row.extend([0] * (_SHINGLE_WORDS - len(row)))
        lengths = np.fromiter(map(len, words), np.int64, len(words))
        shingles, starts = _shingle(np.fromiter(chain.from_iterable(words), np.uint64), lengths)
        found = np.empty((len(texts), SIGNATURE_PARTS), np.uint32)
        scratch = np.empty_like(shingles)
        for part in range(SIGNATURE_PARTS):
            np.multiply(shingles, self._factors[part], out=scratch)
            np.add(scratch, self._summands[part], out=scratch)
            found[:, part] = np.minimum.reduceat(scratch, starts)
        return found


def _shingle(
    words: npt.NDArray[np.uint64], lengths: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """Return the hashes of each row's word triples, and where each row's begin."""
    mixed = words[:-2] * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(29))) + words[1:-1] * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(31))) + words[2:] * np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(32)
    # The last two words of a row begin no triple of it.
    ends = np.cumsum(lengths)
    keep = np.ones(len(words), np.bool_)
    keep[ends - 1] = keep[ends - 2] = False
    starts = np.concatenate([[0], np.cumsum(lengths - 2)[:-1]])
    return mixed[keep[:-2]].astype(np.uint32), starts


def band_keys(signatures: Signatures) -> npt.NDArray[np.uint64]:
    """Return a hash of each band of signatures, uint64 [N, NUM_BANDS]; near-duplicates share one."""
    parts = signatures.reshape(len(signatures), NUM_BANDS, BAND_PARTS).astype(np.uint64)
    keys = np.zeros(parts.shape[:2], np.uint64)
    for place in range(BAND_PARTS):
        keys = (keys ^ parts[:, :, place]) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(32)
    return keys


def similarity(left: npt.NDArray[np.generic], right: npt.NDArray[np.generic]) -> npt.NDArray[np.float64]:
    """Return the estimated similarity of signatures pair by pair, float64 [N]."""
    found: npt.NDArray[np.float64] = (left == right).mean(axis=1, dtype=np.float64)
    return found
