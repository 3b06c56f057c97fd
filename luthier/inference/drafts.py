"""Guesses of an answer's next tokens from what it has said before. No tensors.

Answers repeat themselves, and their prompts: names, code, JSON, quotations. A step that runs the guessed
tokens too, as rows of their own, tells of each whether it is what the model would have said, and reads the
weights once for all of them. What is said stays the same; only how many steps it takes does not. The idea
and its yield: Saxena 2023, "Prompt Lookup Decoding"; Leviathan et al. 2023, arXiv 2211.17192, on checking
guesses in one step.
"""

from collections.abc import Callable, Sequence

# Tokens that must have stood together before, at least, and at most: the longest that have say what follows.
_FEWEST, _MOST = 2, 4
# How far one guess moves what is thought of the next.
_NEWS = 0.25
# What is thought of the first.
_START = 0.25
# Tokens before the first guess that are looked back on: to take them in is a few milliseconds of everybody's.
_MOST_BEFORE = 4096

# What a step takes whatever its rows, in rows; and what a second row takes, as a share of a step of one.
# Measured (docs/decisions/0035), with something to spare.
_FIXED_ROWS, _SECOND_ROW = 8, 0.35
# Rows that guesses fill a step up to: above, each more costs as much as it brings at best.
_MOST_ROWS = 16


def room_for_guesses(num_rows: int) -> int:
    """Return how many guesses a step of so many other rows takes."""
    return max(0, _MOST_ROWS - num_rows)


def least_chance(num_rows: int) -> float:
    """Return how likely a guess must be right to be worth its row, in a step of so many others."""
    return _SECOND_ROW if num_rows == 1 else num_rows / (num_rows + _FIXED_ROWS)


class Drafter:
    """The guesses of one answer, and how often they were right.

    `chance` is what is thought of the next one.

    Args:
        tokens: the answer's with its prompt, as far as they are; negative ones have no meaning.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens: list[int] = []
        # Where some tokens that stood together were last followed by another: its place.
        self._next_of: dict[tuple[int, ...], int] = {}
        # The place that the next token is guessed from, None for no guess.
        self._source: int | None = None
        self.chance = _START
        for token in tokens[-_MOST_BEFORE:]:
            self._add(token)
        self._seek()

    def add(self, token: int) -> None:
        """Take the token that came next, and learn from it whether the guess was right."""
        if self._source is not None:
            is_right = self._tokens[self._source] == token
            self.chance += _NEWS * (is_right - self.chance)
        self._add(token)
        self._seek()

    def guess(self, most: int, *, least_chance: Callable[[int], float]) -> list[int]:
        """Return the next tokens as far as they are likely enough.

        Args:
            least_chance: that a guess and all before it are right, by how many these are.

        Returns:
            The tokens in order, none where there is nothing to guess from.
        """
        found: list[int] = []
        if self._source is None:
            return found
        chance = self.chance
        while len(found) < most and chance >= least_chance(len(found)):
            place = self._source + len(found)
            # What repeats at once is guessed from the guesses themselves.
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
