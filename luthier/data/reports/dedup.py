"""Indexes of the rows seen before, in memory that does not grow with their number.

Exact repeats are found among about a million different rows, near-duplicates among the last 262,144.
"""

from array import array

import numpy as np
import numpy.typing as npt

from luthier.data.prepare.minhash import (
    MIN_SIMILARITY,
    NUM_BANDS,
    SIGNATURE_PARTS,
    Signatures,
    band_keys,
    similarity,
)

WINDOW_ROWS = 2**18
_EXACT_SLOTS = 2**21
_MAX_PROBES = 32


class ExactIndex:
    """Contents seen before: a hash table of fixed size that forgets only when it is full."""

    def __init__(self) -> None:
        self._keys = array("Q", bytes(8 * _EXACT_SLOTS))
        self._numbers = array("q", bytes(8 * _EXACT_SLOTS))

    def find(self, key: int) -> int | None:
        """Return the number of the first row of this content, None when none was added."""
        return self._look(key)[0]

    def find_or_add(self, key: int, number: int) -> int | None:
        """Return the number of the first row of this content; add it when there is none."""
        found, slot = self._look(key)
        if found is None:
            self._keys[slot], self._numbers[slot] = key or 1, number
        return found

    def _look(self, key: int) -> tuple[int | None, int]:
        # 0 marks an empty slot.
        key = key or 1
        keys = self._keys
        first = key % _EXACT_SLOTS
        for slot in range(first, first + _MAX_PROBES):
            place = slot % _EXACT_SLOTS
            if keys[place] == key:
                return self._numbers[place], place
            if keys[place] == 0:
                return None, place
        return None, first


class NearIndex:
    """Signatures of the last rows, and by each band the last row that had it."""

    def __init__(self, num_rows: int = WINDOW_ROWS) -> None:
        self._num_rows = num_rows
        self._num_added = 0
        # Eight bits of each part suffice to compare, and take a quarter of the memory.
        self._signatures = np.full((num_rows, SIGNATURE_PARTS), 0, np.uint8)
        self._numbers = np.full(num_rows, -1, np.int64)
        self._last = np.full((NUM_BANDS, num_rows), -1, np.int32)

    def find(self, signatures: Signatures) -> npt.NDArray[np.int64]:
        """Return for each row the number of an earlier near-duplicate, -1 without one; int64 [N]."""
        return self._find(signatures, band_keys(signatures))

    def _find(self, signatures: Signatures, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        short = signatures.astype(np.uint8)
        found = np.full(len(signatures), -1, np.int64)
        slots = (keys % np.uint64(self._num_rows)).astype(np.int64)
        candidates = self._last[np.arange(NUM_BANDS)[:, None], slots.T]
        for band in range(NUM_BANDS):
            (rows,) = np.nonzero((candidates[band] >= 0) & (found < 0))
            if len(rows):
                places = candidates[band][rows]
                is_near = similarity(short[rows], self._signatures[places]) >= MIN_SIMILARITY
                found[rows[is_near]] = self._numbers[places[is_near]]
        return found

    def find_and_add(self, signatures: Signatures, numbers: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Do as `find` does, and add all rows."""
        keys = band_keys(signatures)
        found = self._find(signatures, keys)
        self._find_within(signatures, keys, numbers, found)
        places = (self._num_added + np.arange(len(signatures))) % self._num_rows
        self._num_added += len(signatures)
        self._signatures[places] = signatures.astype(np.uint8)
        self._numbers[places] = numbers
        slots = (keys % np.uint64(self._num_rows)).astype(np.int64)
        for band in range(NUM_BANDS):
            self._last[band, slots[:, band]] = places
        return found

    @staticmethod
    def _find_within(
        signatures: Signatures,
        keys: npt.NDArray[np.uint64],
        numbers: npt.NDArray[np.int64],
        found: npt.NDArray[np.int64],
    ) -> None:
        """Fill in near-duplicates among the rows themselves."""
        for band in range(NUM_BANDS):
            order = np.argsort(keys[:, band], kind="stable")
            (places,) = np.nonzero(keys[order[1:], band] == keys[order[:-1], band])
            if not len(places):
                continue
            earlier, later = order[places], order[places + 1]
            is_new = found[later] < 0
            earlier, later = earlier[is_new], later[is_new]
            is_near = similarity(signatures[earlier], signatures[later]) >= MIN_SIMILARITY
            found[later[is_near]] = numbers[earlier[is_near]]
