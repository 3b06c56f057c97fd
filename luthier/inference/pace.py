"""How often answers that stream are told of new text. No tensors, no HTTP.

A token's way to its client, through this process and the API, takes some of the processors that compute the
next one, and with many streams at once a step is shorter than anybody reads. Where the operator wants it,
text is then told a few tokens at a time; an answer's first token, its end, and a few streams always at once.
"""

# Below it holding back is not worth it, and above it a reader would see text jump.
_LEAST_GAP_SECONDS, _MOST_GAP_SECONDS = 0.005, 0.05


class Pace:
    """How long new text of an answer may wait for more.

    Args:
        events_per_second: what all streams of a step may be told of together; 0 for every token at once.
    """

    def __init__(self, events_per_second: int = 0) -> None:
        self._events_per_second = events_per_second

    def gap_seconds(self, num_rows: int) -> float:
        """Return the least time between two pieces of one answer.

        Args:
            num_rows: answers that are made beside each other.

        Returns:
            Seconds, at most 0.05; 0 where each token is told at once.
        """
        if self._events_per_second == 0:
            return 0.0
        gap = num_rows / self._events_per_second
        return min(gap, _MOST_GAP_SECONDS) if gap >= _LEAST_GAP_SECONDS else 0.0
