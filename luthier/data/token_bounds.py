"""How few tokens a text can have, told by its length, so that one that is far too long need not be tokenised.

Certain or nothing: of a tokenizer whose steps may drop or shorten text nothing is told.
"""

import json
from typing import Any

import tokenizers

from luthier.data.tokens import Tokenizer

# Canonical composition makes at most three bytes one (U+212A is a K), and three letters of Hangul a third.
_MAX_COMPOSED = 3
# Steps before the model that leave every character in its place, Split unless it removes.
_KEEPING = {"ByteLevel", "Digits", "Metaspace", "Split"}
_SPACE_TO_MARK = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}


def measure_longest(tokenizer: Tokenizer) -> int | None:
    """Return how much of a text one token can stand for.

    Args:
        tokenizer: the tokenizer.

    Returns:
        UTF-8 bytes at most, or None where there is no such number.
    """
    inner = tokenizer.pipeline
    if any(token.lstrip or token.rstrip for token in inner.get_added_tokens_decoder().values()):
        # Such a mark takes all spaces beside it.
        return None
    steps = _flatten(inner.pre_tokenizer, "pretokenizers")
    if any(step["type"] not in _KEEPING or step.get("behavior") == "Removed" for step in steps):
        return None
    is_byte_level = any(step["type"] == "ByteLevel" for step in steps)
    if not _has_all_bytes(inner, is_byte_level=is_byte_level):
        return None
    # A mark for spaces may be one in the text, which is longer than a space: a token counts as it is spelled.
    longest = max(
        len(tokenizer.token_bytes(i) if is_byte_level else (inner.id_to_token(i) or "").encode())
        for i in range(tokenizer.vocab_size)
    )
    for step in _flatten(inner.normalizer, "normalizers"):
        if step["type"] == "NFC":
            longest *= _MAX_COMPOSED
        elif step["type"] != "Prepend" and step != _SPACE_TO_MARK:
            return None
    return longest


def _has_all_bytes(inner: tokenizers.Tokenizer, *, is_byte_level: bool) -> bool:
    """Whether the model has a token for every byte, so that none is dropped or taken together as unknown."""
    model = inner.model
    if not isinstance(model, tokenizers.models.BPE):
        return False
    if is_byte_level:
        names = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    else:
        names = [f"<0x{byte:02X}>" for byte in range(256)] if model.byte_fallback else [""]
    return all(inner.token_to_id(name) is not None for name in names)


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
