"""A lower bound of a text's tokens by its length, so that one that is far too long need not be tokenised.

There is none for a tokenizer whose steps may shorten text by any amount.
"""

import json
from dataclasses import dataclass
from typing import Any

import tokenizers

from luthier.data.rendering.tokenizer import Tokenizer, byte_of_char

# Canonical composition makes at most three bytes one (U+212A is a K), and three letters of Hangul a third.
_MAX_COMPOSED = 3
# Steps before the model that leave every character in its place, Split unless it removes.
_KEEPING = {"ByteLevel", "Digits", "Metaspace", "Split"}
_SPACE_TO_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
# No UTF-8 has these bytes (RFC 3629, section 1).
_NEVER = {0xC0, 0xC1, *range(0xF5, 0x100)}


@dataclass(frozen=True)
class TokenBounds:
    """A token stands for at most `max_token_bytes` of a text; those in `dropped` are in no token."""

    max_token_bytes: int
    dropped: bytes = b""

    def min_num_tokens(self, text: str) -> int:
        """Return the least number of tokens that a text can have."""
        return -(-len(text.encode().translate(None, self.dropped)) // self.max_token_bytes)


def find_bounds(tokenizer: Tokenizer) -> TokenBounds | None:
    """Return how much of a text one token can stand for, or None without a bound."""
    inner = tokenizer.pipeline
    if not isinstance(inner.model, tokenizers.models.BPE):
        return None
    if any(token.lstrip or token.rstrip for token in inner.get_added_tokens_decoder().values()):
        # Such a token takes all spaces beside it.
        return None
    steps = _flatten(inner.pre_tokenizer, "pretokenizers")
    if any(step["type"] not in _KEEPING or step.get("behavior") == "Removed" for step in steps):
        return None
    is_byte_level = any(step["type"] == "ByteLevel" for step in steps)
    names = _byte_names(inner, is_byte_level=is_byte_level)
    dropped = bytes(byte for byte, name in names.items() if inner.token_to_id(name) is None)
    if dropped and not is_byte_level:
        # Then the whole character is unknown, not the byte, and many of them may be one token.
        return None
    # The text may hold the sign for spaces itself, longer than a space: a token counts as it is spelled.
    longest = max(
        len(tokenizer.token_bytes(i) if is_byte_level else (inner.id_to_token(i) or "").encode())
        for i in range(tokenizer.vocab_size)
    )
    for step in _flatten(inner.normalizer, "normalizers"):
        if step["type"] == "NFC" and not dropped:
            longest *= _MAX_COMPOSED
        elif step["type"] != "Prepend" and step != _SPACE_TO_MARK:
            return None
    return TokenBounds(longest, dropped)


def _byte_names(inner: tokenizers.Tokenizer, *, is_byte_level: bool) -> dict[int, str]:
    """Return the names of the tokens of single bytes that a text may have."""
    if is_byte_level:
        table = {byte: char for char, byte in byte_of_char().items()}
    else:
        table = {byte: f"<0x{byte:02X}>" if inner.model.byte_fallback else "" for byte in range(256)}
    return {byte: name for byte, name in table.items() if byte not in _NEVER}


def _flatten(part: Any, members: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    steps, found = [json.loads(part.__getstate__())], []
    while steps:
        step = steps.pop(0)
        if step["type"] == "Sequence":
            steps[:0] = step[members]
        else:
            found.append(step)
    return found
