"""Groups of rows that a split must keep together, found from their signatures in linear time.

Groups depend on the rows, never on their order: all is sorted by content first.
"""

from collections.abc import Callable

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

# Rows of one band that are compared with each: linear time where thousands share it.
_MAX_NEIGHBOURS = 64
_CHUNK_PAIRS = 65536
# A part of a signature that more than this share of a group's rows have is their template's.
_SHARED = 0.5

_Numbers = npt.NDArray[np.int64]
_Compare = Callable[[_Numbers, _Numbers], npt.NDArray[np.bool_]]


def group_near(signatures: Signatures) -> _Numbers:
    """Return the number of each row's group, int64 [N]: the transitive closure of near-duplicates."""
    unique, inverse = np.unique(signatures, axis=0, return_inverse=True)
    keys = band_keys(unique)
    parents = np.arange(len(unique))

    def is_near(left: _Numbers, right: _Numbers) -> npt.NDArray[np.bool_]:
        return similarity(unique[left], unique[right]) >= MIN_SIMILARITY

    for band in range(NUM_BANDS):
        order = np.argsort(keys[:, band], kind="stable")
        _join_neighbours(order, keys[order, band], parents, is_near)
    return find_roots(parents)[inverse.reshape(-1)]


def group_beside_template(signatures: Signatures) -> _Numbers:
    """Return the groups, int64 [N], of rows of one template, by the texts beside the template.

    A part of a signature is a draw from a row's word triples. Parts that most rows share are the template's
    and are left out.
    """
    unique, inverse = np.unique(signatures, axis=0, return_inverse=True)
    is_own = np.empty(unique.shape, np.bool_)
    for part in range(SIGNATURE_PARTS):
        _, places, counts = np.unique(unique[:, part], return_inverse=True, return_counts=True)
        is_own[:, part] = counts[places.reshape(-1)] <= _SHARED * len(unique)
    parents = np.arange(len(unique))

    def is_near(left: _Numbers, right: _Numbers) -> npt.NDArray[np.bool_]:
        counts = is_own[left] | is_own[right]
        num_equal = ((unique[left] == unique[right]) & counts).sum(axis=1)
        found: npt.NDArray[np.bool_] = num_equal >= MIN_SIMILARITY * counts.sum(axis=1)
        return found

    for part in range(SIGNATURE_PARTS):
        (rows,) = np.nonzero(is_own[:, part])
        order = rows[np.argsort(unique[rows, part], kind="stable")]
        _join_neighbours(order, unique[order, part], parents, is_near)
    # Rows of the template alone are all equal.
    (bare,) = np.nonzero(~is_own.any(axis=1))
    for row in bare[1:].tolist():
        join(parents, int(bare[0]), row)
    return find_roots(parents)[inverse.reshape(-1)]


def _join_neighbours(
    order: _Numbers, keys: npt.NDArray[np.unsignedinteger], parents: _Numbers, is_near: _Compare
) -> None:
    """Join rows of equal keys, which are neighbours in `order`, where they are near."""
    for distance in range(1, min(_MAX_NEIGHBOURS, len(order) - 1) + 1):
        (places,) = np.nonzero(keys[distance:] == keys[:-distance])
        if not len(places):
            return
        for chunk in np.array_split(places, len(places) // _CHUNK_PAIRS + 1):
            left, right = order[chunk], order[chunk + distance]
            roots = find_roots(parents)
            is_open = roots[left] != roots[right]
            left, right = left[is_open], right[is_open]
            found = is_near(left, right)
            for one, other in zip(left[found].tolist(), right[found].tolist(), strict=True):
                join(parents, one, other)


def join(parents: _Numbers, one: int, other: int) -> None:
    """Make one group of two, whose root is the smaller one's."""
    first, second = sorted((_root(parents, one), _root(parents, other)))
    parents[second] = first


def _root(parents: _Numbers, place: int) -> int:
    while (parent := int(parents[place])) != place:
        parents[place] = parents[parent]
        place = parent
    return place


def find_roots(parents: _Numbers) -> _Numbers:
    """Return the root of every row, and compress the paths to them."""
    while not np.array_equal(parents, above := parents[parents]):
        parents[:] = above
    return parents.copy()
