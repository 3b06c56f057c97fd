"""Speculative decoding without a draft model: proposes an answer's next tokens from its text. No tensors.

Answers repeat themselves and their prompts: names, code, JSON, quotations. A step that runs draft tokens too,
each as a row of its own, verifies them against the model's own choices and reads the weights once for all.
The answer stays the same; only its number of steps falls. The idea and its yield: Saxena 2023, "Prompt Lookup
Decoding"; Leviathan et al. 2023, arXiv 2211.17192, on verifying drafts in one step.
"""

from collections.abc import Callable, Sequence

# Lengths of the n-grams that are looked up; of those found the longest decides.
_FEWEST, _MOST = 2, 4
# Weight of one outcome in the estimated chance of the next.
_NEWS = 0.25
# The chance before the first outcome.
_START = 0.25
# Tokens before the first proposal that are indexed: each delays the step that it happens in.
_MOST_BEFORE = 4096

# The fixed cost of a step, in rows; and the cost of a second row, as a share of a step of one. Measured
# (docs/decisions/0035), with a margin.
_FIXED_ROWS, _SECOND_ROW = 8, 0.35
# Rows of a step with drafts; above, one more costs as much as it gains at best.
_MOST_ROWS = 16


def room_for_drafts(num_rows: int) -> int:
    """Return how many draft tokens a step of `num_rows` other rows takes."""
    return max(0, _MOST_ROWS - num_rows)


def least_chance(num_rows: int) -> float:
    """Return the least chance at which a draft is worth its row in a step of `num_rows` others."""
    return _SECOND_ROW if num_rows == 1 else num_rows / (num_rows + _FIXED_ROWS)


class NgramProposer:
    """Proposes one answer's tokens, and counts how often they were right.

    `chance` is the estimated probability that the next one is right.

    Args:
        tokens: the prompt's and the answer's so far; negative ones are virtual.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        # Of each n-gram, the place of the token that followed it last.
        self._next_of: dict[tuple[int, ...], int] = {}
        # The place that the next token is proposed from, None for no proposal.
        self._source: int | None = None
        self.chance = _START
        for token in tokens[-_MOST_BEFORE:]:
            self._add(token)
        self._seek()

    def add(self, token: int) -> None:
        """Append the next token, and note whether the proposal was right."""
        if self._source is not None:
            is_right = self._tokens[self._source] == token
            self.chance += _NEWS * (is_right - self.chance)
        self._add(token)
        self._seek()

    def propose(self, most: int, *, least_chance: Callable[[int], float]) -> list[int]:
        """Return draft tokens as far as they are likely enough.

        Args:
            least_chance: that a draft and all before it are right, by the number of those before.
        """
        found: list[int] = []
        if self._source is None:
            return found
        chance = self.chance
        while len(found) < most and chance >= least_chance(len(found)):
            place = self._source + len(found)
            # What repeats at once is proposed from the drafts themselves.
            beyond = place - len(self._tokens)
            token = self._tokens[place] if beyond < 0 else found[beyond]
            if token < 0:
                break
            found.append(token)
            chance *= self.chance
        return found

    def _add(self, token: int) -> None:
        tokens, place = self._tokens, len(self._tokens)
        for count in range(_FEWEST, _MOST + 1):
            if place < count:
                break
            self._next_of[tuple(tokens[place - count :])] = place
        tokens.append(token)

    def _seek(self) -> None:
        tokens = self._tokens
        for count in range(min(_MOST, len(tokens)), _FEWEST - 1, -1):
            self._source = self._next_of.get(tuple(tokens[-count:]))
            if self._source is not None:
                return
        self._source = None
