"""Special tokens that a message spells: rendered text marks them as text.

`<|im_end|>` within a message's content ends no turn: the renderer puts SPLIT after its first character, the
tokenizer encodes what is before and behind it separately, and SPLIT itself becomes no token.
"""

import re
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import msgspec

# A noncharacter, which Unicode keeps for uses within a program (The Unicode Standard, section 23.7).
SPLIT = "\ufdd0"


class _Added(msgspec.Struct):
    content: str
    special: bool = False


class _TokenizerFile(msgspec.Struct):
    added_tokens: list[_Added] = []


class SpecialTokens:
    """The special tokens of a tokenizer, by their spelling. One of a single character is left out."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._texts = sorted({text for text in texts if len(text) > 1}, key=lambda text: (-len(text), text))
        self._first_chars = {text[0] for text in self._texts}

    @classmethod
    def load(cls, base_folder: Path) -> "SpecialTokens":
        """Read those of a base's tokenizer.json; none where the file is missing or broken."""
        path = base_folder / "tokenizer.json"
        try:
            content = msgspec.json.decode(path.read_bytes(), type=_TokenizerFile)
        except (FileNotFoundError, msgspec.MsgspecError):
            # Tokenizer.load reports the error.
            return cls()
        return cls(token.content for token in content.added_tokens if token.special)

    def as_text(self, value: Any) -> Any:
        """Return a JSON value in whose texts, names included, every special token is split."""
        if isinstance(value, str):
            if not any(char in value for char in self._first_chars):
                return value
            return self._spelled.sub(lambda found: found[0][0] + SPLIT + found[0][1:], value)
        if isinstance(value, list | tuple):
            return [self.as_text(item) for item in value]
        if isinstance(value, dict):
            return {self.as_text(name): self.as_text(item) for name, item in value.items()}
        return value

    def split(self, text: str) -> list[str]:
        """Return the pieces of a rendered text that are encoded separately."""
        if SPLIT not in text or not self._texts:
            return [text]
        pieces, start = [], 0
        for found in self._split_spelled.finditer(text):
            pieces.append(text[start : found.start() + 1])
            start = found.start() + 2
        return [*pieces, text[start:]]

    @cached_property
    def _spelled(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(text) for text in self._texts))

    @cached_property
    def _split_spelled(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(text[0] + SPLIT + text[1:]) for text in self._texts))


def without_splits(text: str) -> str:
    """Return a rendered text without the splits."""
    return text.replace(SPLIT, "")
