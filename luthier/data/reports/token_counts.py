"""Counts of rows by their tokens, with memory that does not grow with the rows."""

import heapq
import itertools
from collections.abc import Sequence

import numpy as np

from luthier.data.reports.file_report import Bin, RowLength, TokenStatistics

# Lengths up to this are counted one by one; longer rows are counted together, and the longest are kept.
_MAX_LENGTH = 2**20
_NUM_LONGEST = 10


class TokenCounts:
    def __init__(self, context_length: int) -> None:
        self._context_length = context_length
        self._counts = np.zeros(_MAX_LENGTH + 1, np.int64)
        self._longest: list[tuple[int, int]] = []
        self._num_rows = self._total = self._sum_lengths = self._supervised = self._num_over = self._max = 0

    def add(self, line: int, lengths: Sequence[int], num_supervised: int) -> None:
        """Count one row: the tokens of its texts, of a preference two, and its supervised tokens in all."""
        length = max(lengths)
        self._num_rows += 1
        self._total += sum(lengths)
        self._sum_lengths += length
        self._supervised += num_supervised
        self._num_over += length > self._context_length
        self._max = max(self._max, length)
        self._counts[min(length, _MAX_LENGTH)] += 1
        # Of two rows of one length the first is kept.
        entry = (length, -line)
        if len(self._longest) < _NUM_LONGEST:
            heapq.heappush(self._longest, entry)
        elif entry > self._longest[0]:
            heapq.heapreplace(self._longest, entry)

    def to_report(self) -> TokenStatistics | None:
        """Return the counts; None when there is no row."""
        if self._num_rows == 0:
            return None
        below = np.cumsum(self._counts)
        median, p90, p99 = (
            int(np.searchsorted(below, np.ceil(share * self._num_rows))) for share in (0.5, 0.9, 0.99)
        )
        return TokenStatistics(
            total=self._total,
            supervised=self._supervised,
            supervised_share=self._supervised / self._total if self._total else 0.0,
            mean=self._sum_lengths / self._num_rows,
            median=median,
            p90=p90,
            p99=p99,
            max=self._max,
            histogram=self._histogram(),
            longest=[
                RowLength(line=-line, tokens=length) for length, line in sorted(self._longest, reverse=True)
            ],
            context_length=self._context_length,
            over_context=self._num_over,
        )

    def _histogram(self) -> list[Bin]:
        """Return the rows by powers of two, from the first that has any to the last."""
        edges = [0, *(2**power for power in range(4, 21)), max(self._max, _MAX_LENGTH) + 1]
        bins = [
            Bin(start=start, end=end, rows=int(self._counts[start:end].sum()))
            for start, end in itertools.pairwise(edges)
        ]
        filled = [place for place, one in enumerate(bins) if one.rows]
        return bins[filled[0] : filled[-1] + 1]
