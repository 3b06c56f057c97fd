"""How many tokens a row has and how many of them are learnt, from words counted before: for reports alone.

The tokens of a text are those of its words one after another, where the tokenizer's own rules say so. A word
here is what begins at a space that follows something else, so it is cut where every known pre-tokenizer cuts;
the text before, after and between the tokenizer's marks is cut there too, as the library itself does it. A
tokenizer of any other kind, and a row of any other shape, is left to `luthier.data.tokens`.
"""

import json
import re
import unicodedata
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from typing import Any, NamedTuple

import tokenizers

from luthier.data.mask import RenderedRow, Span
from luthier.data.tokens import Tokenizer

# Patterns that pre-tokenizers cut with. What such a pattern matches holds a space only where it begins, or is
# all spaces; it looks back at nothing, and ahead only from spaces. So before a space that follows no space
# there is always a cut, and what is on one side of it does not depend on the other.
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_MARKED_WORD = r"[^\r\n\p{L}\p{N}]?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_PATTERNS = frozenset(
    {
        # GPT-2
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        # Llama 3, and GPT-4 before it
        rf"{_CONTRACTION}|{_MARKED_WORD}\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
        # Qwen 2 and 3
        rf"{_CONTRACTION}|{_MARKED_WORD}\p{{L}}+|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_SPACES}",
        # GPT-4o, Llama 4
        rf"{_MARKED_WORD}{_UPPER}*{_LOWER}+{_CONTRACTION}?|{_MARKED_WORD}{_UPPER}+{_LOWER}*{_CONTRACTION}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}",
    }
)
# Up to a space that follows none. What the patterns take for a space Python does too, but for one character
# that was a space in older versions of Unicode.
_OLD_SPACE = "\u180e"
_ANY_SPACE, _NO_SPACE = rf"[\s{_OLD_SPACE}]", rf"[^\s{_OLD_SPACE}]"
_SEGMENT = re.compile(rf"{_ANY_SPACE}*{_NO_SPACE}*(?:(?! ){_ANY_SPACE}+{_NO_SPACE}*)*")
_MAX_KEPT = 65536
_MAX_KEPT_CHARS = 48
# The count of a word that must be counted together with the next; sums with it are below zero.
_NOT_ALONE = -(2**48)


class RowTokens(NamedTuple):
    """How many tokens a rendered row has, and how many of them are learnt."""

    length: int
    num_supervised: int


class _Kept(dict[str, int]):
    """What was counted last of each text, in bounded memory."""

    def __init__(self, count: Callable[[str], int]) -> None:
        super().__init__()
        self._count = count

    def __missing__(self, text: str) -> int:
        found = self._count(text)
        if len(text) <= _MAX_KEPT_CHARS:
            if len(self) >= _MAX_KEPT:
                self.clear()
            self[text] = found
        return found


class WordTokens:
    """Count the tokens of rendered rows.

    Args:
        tokenizer: one of which `cuts_at_words` is true.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Of two marks that begin alike the library takes the longer.
        marks = sorted((token.content for token in _added(tokenizer.pipeline)), key=len, reverse=True)
        # With a group, so that a text's every second part is a mark; with none of them what never matches.
        self._marks = re.compile(f"({'|'.join(map(re.escape, marks)) or '(?!)'})")
        self._stops = frozenset(
            text for text in marks if tokenizer.pipeline.token_to_id(text) in tokenizer.stop_token_ids
        )
        self._is_normalised = tokenizer.pipeline.normalizer is not None
        self._whole = _Kept(lambda text: len(tokenizer.encode(text)))
        self._after_space = _Kept(
            lambda word: len(tokenizer.encode(f" {word}")) if _ends_a_word(word) else _NOT_ALONE
        )
        self._starts: dict[str, list[int]] = {}

    def count(self, row: RenderedRow) -> RowTokens | None:
        """Count a row's tokens.

        Returns:
            What `encode_rows` and `mask_tokens` make of it; None when it has to be asked of them.
        """
        if self._is_normalised and not unicodedata.is_normalized("NFC", row.text):
            return None
        parts = _Parts()
        if row.cut:
            self._add_parts(parts, 0, row.text[: row.cut])
        self._add_parts(parts, row.cut, row.text[row.cut :])
        num_supervised = self._count_supervised(parts, row.spans)
        return None if num_supervised is None else RowTokens(parts.num_tokens, num_supervised)

    def _add_parts(self, parts: "_Parts", place: int, text: str) -> None:
        for number, part in enumerate(self._marks.split(text)):
            if not part:
                continue
            parts.starts.append(place)
            parts.tokens_before.append(parts.num_tokens)
            start, place = place, place + len(part)
            if number % 2 == 0:
                parts.texts.append(part)
                parts.num_tokens += self._count_text(part)
                continue
            parts.texts.append("")
            parts.num_tokens += 1
            if part in self._stops:
                parts.stops.append((start, place, parts.num_tokens))

    def _count_text(self, text: str) -> int:
        """Count the tokens of a text that has no mark in it."""
        first, *words = text.split(" ")
        if not words:
            return self._whole[first]
        if _ends_a_word(first):
            found = self._whole[first] + sum(map(self._after_space.__getitem__, words))
            if found >= 0:
                return found
        return sum(map(self._whole.__getitem__, _SEGMENT.findall(text)))

    def _count_supervised(self, parts: "_Parts", spans: list[Span]) -> int | None:
        num_supervised = end_before = 0
        for span in spans:
            if span.start < end_before:
                return None
            end_before = span.end
            last = max(
                (index for start, end, index in parts.stops if start >= span.start and end <= span.end),
                default=None,
            )
            if last is None:
                return None
            num_supervised += last - self._count_before(parts, span.start)
        return num_supervised

    def _count_before(self, parts: "_Parts", place: int) -> int:
        """Count the tokens that begin before a place in the row."""
        at = bisect_right(parts.starts, place) - 1
        place -= parts.starts[at]
        found = parts.tokens_before[at]
        if place == 0:
            return found
        text = parts.texts[at]
        if not text:
            return found + 1
        for match in _SEGMENT.finditer(text):
            segment = match.group()
            if place <= len(segment):
                return found + bisect_left(self._find_starts(segment), place)
            place -= len(segment)
            found += self._whole[segment]
        return found

    def _find_starts(self, segment: str) -> list[int]:
        """Return where in a segment its tokens begin."""
        starts = self._starts.get(segment)
        if starts is None:
            [encoding] = self._tokenizer.encode_batch([segment])
            starts = encoding.spans[:, 0].tolist()
            if len(segment) <= _MAX_KEPT_CHARS:
                if len(self._starts) >= _MAX_KEPT:
                    self._starts.clear()
                self._starts[segment] = starts
        return starts


class _Parts:
    """A row's text cut at its marks: where each part begins, and how many tokens come before it.

    `texts` are empty for the marks themselves. `stops` are the marks that end a turn: start,
    end, and the number of tokens up to it and with it.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self.starts: list[int] = []
        self.texts: list[str] = []
        self.tokens_before: list[int] = []
        self.stops: list[tuple[int, int, int]] = []


def _ends_a_word(text: str) -> bool:
    """Whether a space after this text is the first of its run: there every known pattern cuts."""
    return bool(text) and not text[-1].isspace() and text[-1] != _OLD_SPACE


def cuts_at_words(tokenizer: Tokenizer) -> bool:
    """Whether a tokenizer's tokens are those of its words, as this module cuts them.

    Args:
        tokenizer: the tokenizer.

    Returns:
        True when every step of it is known to allow it.
    """
    inner = tokenizer.pipeline
    model = inner.model
    if not isinstance(model, tokenizers.models.BPE) or model.dropout:
        return False
    if inner.normalizer is not None and _state(inner.normalizer)["type"] != "NFC":
        return False
    if inner.pre_tokenizer is None:
        return False
    steps = _flatten(_state(inner.pre_tokenizer))
    # Digits are parted from all else by what each character is, which no cut alters.
    others = [step for step in steps if step["type"] != "Digits"]
    # What follows the first cut sees each word by itself.
    if not others or not _cuts(others[0]) or not all(_cuts(step) or _keeps(step) for step in others):
        return False
    added = _added(inner)
    is_plain = not any(
        token.lstrip or token.rstrip or token.single_word or not token.content for token in added
    )
    # Marks are looked for at once, in the text as it was given: those that are not come in a second search.
    if len({token.normalized for token in added}) > 1 or (
        inner.normalizer is not None and any(token.normalized for token in added)
    ):
        return False
    ends = [inner.id_to_token(token_id) for token_id in tokenizer.stop_token_ids]
    return is_plain and {token.content for token in added}.issuperset(ends)


def _added(inner: tokenizers.Tokenizer) -> list[tokenizers.AddedToken]:
    return list(inner.get_added_tokens_decoder().values())


def _state(part: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(part.__getstate__())
    return found


def _flatten(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step["type"] == "Sequence":
        return [one for part in step["pretokenizers"] for one in _flatten(part)]
    return [step]


def _cuts(step: dict[str, Any]) -> bool:
    """Whether a step cuts before every space that follows no space, each side by itself."""
    if step["type"] == "ByteLevel":
        return not step["add_prefix_space"] and step.get("use_regex", True)
    is_split = step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]
    return is_split and step["pattern"].get("Regex") in _PATTERNS


def _keeps(step: dict[str, Any]) -> bool:
    """Whether a step cuts nothing."""
    return step["type"] == "ByteLevel" and not step["add_prefix_space"] and not step["use_regex"]
