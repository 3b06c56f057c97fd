"""The tokenizer: text to tokens and back, exact to the byte, over the `tokenizers` library. Never torch.

It is the only one: the API, prepare, the training process and the engine all use it. A special token that a
message spells is text: `<|im_end|>` within a message's content ends no turn. The renderer puts SPLIT after
its first character, the tokenizer encodes what is before and behind it separately, and SPLIT itself becomes
no token.
"""

import codecs
import functools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt
import tokenizers

from luthier.core.errors import BaseUnavailableError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_METASPACE = "\u2581"


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

    @functools.cached_property
    def _spelled(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(text) for text in self._texts))

    @functools.cached_property
    def _split_spelled(self) -> re.Pattern[str]:
        return re.compile("|".join(re.escape(text[0] + SPLIT + text[1:]) for text in self._texts))


def without_splits(text: str) -> str:
    """Return a rendered text without the splits."""
    return text.replace(SPLIT, "")


class Encoding(NamedTuple):
    """A text's tokens and the characters each covers: `spans[i] = (start, end)`, end not included."""

    ids: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int64]


@functools.cache
def byte_of_char() -> dict[str, int]:
    """Return the map from the printable characters of byte-level BPE back to bytes.

    The convention of GPT-2's encoder: printable Latin-1 bytes stand for themselves, the other bytes take
    the characters from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    table.update({chr(0x100 + place): byte for place, byte in enumerate(others)})
    return table


def _decoder_steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] == "Sequence":
        return [step for part in decoder["decoders"] for step in _decoder_steps(part)]
    return [decoder]


def read_json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _as_ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int) and not isinstance(item, bool)]


def _find_id(inner: tokenizers.Tokenizer, token: Any) -> int | None:
    """Return the id of a token as tokenizer_config.json names it: a text, or an object with one."""
    text = token.get("content") if isinstance(token, dict) else token
    return inner.token_to_id(text) if isinstance(text, str) else None


def _leading_ids(inner: tokenizers.Tokenizer) -> list[int]:
    """Return the ids that the pipeline's post-processor puts before a text."""
    bare, whole = (inner.encode("a", add_special_tokens=added).ids for added in (False, True))
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return list(whole[:start])
    return []


def _find_raw_prefix(inner: tokenizers.Tokenizer, names: dict[str, Any]) -> list[int] | None:
    """Return what raw text begins with by `add_bos_token`; None where that is not set."""
    if names.get("add_bos_token") is False:
        return []
    bos_id = _find_id(inner, names.get("bos_token"))
    if names.get("add_bos_token") is True and bos_id is not None:
        return [bos_id]
    return None


def _join(pieces: Sequence[str], encodings: Sequence[Encoding]) -> Encoding:
    """Join the encodings of a text's pieces, between which the text has one more character."""
    if len(encodings) == 1:
        return encodings[0]
    starts = [0]
    for piece in pieces[:-1]:
        starts.append(starts[-1] + len(piece) + 1)
    return Encoding(
        np.concatenate([encoding.ids for encoding in encodings]),
        np.concatenate([encoding.spans + start for encoding, start in zip(encodings, starts, strict=True)]),
    )


class Tokenizer:
    """A base's tokenizer, read from its tokenizer.json.

    `raw_prefix_ids` is what a text without a template begins with, such as `<bos>`; None: what the
    pipeline's own post-processor puts before a text.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        stop_token_ids: Iterable[int] = (),
        raw_prefix_ids: Sequence[int] | None = None,
    ) -> None:
        # A tokenizer.json may carry truncation or padding from its training; both alter rows silently.
        inner.no_truncation()
        inner.no_padding()
        # The library's own tokenizer, for others to inspect; never to encode with.
        self.pipeline = inner
        self.stop_token_ids = frozenset(stop_token_ids)
        self.vocab_size: int = inner.get_vocab_size(with_added_tokens=True)
        self._added = inner.get_added_tokens_decoder()
        self._special = SpecialTokens(token.content for token in self._added.values() if token.special)
        self.raw_prefix_ids = _leading_ids(inner) if raw_prefix_ids is None else list(raw_prefix_ids)
        # Cache of the tokens seen whose text does not depend on their neighbours.
        self.text_cache: dict[int, str] = {}
        # Those seen that are parts of characters, or special.
        self._uncached: set[int] = set()
        # The state of the decoder alone: serialising a whole tokenizer is slow.
        decoder = inner.decoder
        steps = _decoder_steps(None if decoder is None else json.loads(decoder.__getstate__()))
        kinds = {step["type"] for step in steps}
        unknown = kinds - {"ByteLevel", "ByteFallback", "Metaspace", "Replace", "Fuse", "Strip"}
        if unknown:
            raise BaseUnavailableError(
                f"The base's tokenizer decodes with {', '.join(sorted(unknown))}, which is not supported; "
                "choose a base with a byte-level or byte-fallback tokenizer."
            )
        self._is_byte_level = "ByteLevel" in kinds
        if self._is_byte_level:
            # It may leave spaces out of a token's span.
            inner.post_processor = None
        # Such decoders drop the one space that their normaliser put before the first word.
        self.strips_first_space = any(
            (step["type"] == "Strip" and step["content"] == " " and step["start"] == 1)
            or (step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never")
            for step in steps
        )

    @classmethod
    def load(cls, base_folder: Path) -> "Tokenizer":
        """Read the tokenizer of a fetched base, and the ids that end a turn in its configuration files.

        Raises:
            BaseUnavailableError: when there is no tokenizer.json, or none that can be read.
        """
        path = base_folder / "tokenizer.json"
        if not path.is_file():
            raise BaseUnavailableError(f"The base {base_folder.name} has no tokenizer.json.")
        try:
            inner = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise BaseUnavailableError(
                f"The tokenizer.json of {base_folder.name} can't be read: {str(error)[:160]}"
            ) from error
        config = read_json(base_folder / "config.json")
        text_config = config.get("text_config") or {}
        generation = read_json(base_folder / "generation_config.json")
        stops = {
            token_id
            for source in (config, text_config, generation)
            for token_id in _as_ids(source.get("eos_token_id"))
        }
        names = read_json(base_folder / "tokenizer_config.json")
        eos_id = _find_id(inner, names.get("eos_token"))
        return cls(inner, stops if eos_id is None else stops | {eos_id}, _find_raw_prefix(inner, names))

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a rendered text.

        Special tokens spelled out in the text are recognised, except those that a message spelled
        (see SpecialTokens); none is added.
        """
        pieces = self._special.split(text)
        return [i for piece in pieces for i in self.pipeline.encode(piece, add_special_tokens=False).ids]

    def encode_raw(self, text: str) -> list[int]:
        """Return the token ids of a text without a template, after the prefix of such texts."""
        ids = self.encode(text)
        num_prefix = len(self.raw_prefix_ids)
        return ids if ids[:num_prefix] == self.raw_prefix_ids else self.raw_prefix_ids + ids

    def add_raw_prefix(self, encoding: Encoding) -> Encoding:
        """Do as encode_raw with a text's tokens; the prefix has the span (-1, -1)."""
        prefix = np.asarray(self.raw_prefix_ids, np.int32)
        if np.array_equal(encoding.ids[: len(prefix)], prefix):
            return encoding
        spans = np.full((len(prefix), 2), -1, np.int64)
        return Encoding(np.concatenate([prefix, encoding.ids]), np.concatenate([spans, encoding.spans]))

    def encode_batch(self, texts: Sequence[str]) -> list[Encoding]:
        """Encode many texts at once, on all cores: ids, int32 [T], and spans of characters, int64 [T, 2]."""
        split = [self._special.split(text) for text in texts]
        encoded = self.pipeline.encode_batch(
            [piece for pieces in split for piece in pieces], add_special_tokens=False
        )
        encodings = map(self._with_spans, encoded)
        return [_join(pieces, [next(encodings) for _ in pieces]) for pieces in split]

    @staticmethod
    def _with_spans(encoding: tokenizers.Encoding) -> Encoding:
        spans = np.asarray(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        return Encoding(np.asarray(encoding.ids, dtype=np.int32), spans)

    def is_special(self, token_id: int) -> bool:
        """Whether a token is special, such as an end of turn, which answers don't show."""
        added = self._added.get(token_id)
        return added is not None and bool(added.special)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token, which may be a part of a character; none outside the vocabulary.

        A special token's bytes are its spelling.
        """
        added = self._added.get(token_id)
        if added is not None:
            return str(added.content).encode()
        token = self.pipeline.id_to_token(token_id) if 0 <= token_id < 2**32 else None
        if token is None:
            return b""
        if self._is_byte_level:
            table = byte_of_char()
            known = [table.get(char) for char in token]
            # The library keeps a token with any other character as it is spelled.
            return (
                bytes([byte for byte in known if byte is not None]) if None not in known else token.encode()
            )
        match = _BYTE_TOKEN.fullmatch(token)
        if match:
            return bytes([int(match.group(1), 16)])
        return str(token).replace(_METASPACE, " ").encode()

    def token_text(self, token_id: int) -> str:
        """Return one token as text; bytes that are no whole character become U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def cache_text(self, token_id: int) -> None:
        """Cache a token's text, if it is not special and its bytes are whole characters."""
        if token_id in self._uncached:
            return
        try:
            if not self.is_special(token_id):
                self.text_cache[token_id] = self.token_bytes(token_id).decode()
                return
        except UnicodeDecodeError:
            pass
        self._uncached.add(token_id)

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Return the text of tokens as an answer shows it; bytes that are no UTF-8 become U+FFFD."""
        decoder = StreamDecoder(self, skip_special=skip_special)
        return "".join([decoder.push(token_id) for token_id in ids]) + decoder.flush()


class StreamDecoder:
    """Decodes tokens one at a time: the pushed and flushed texts, joined, equal the decoding of all.

    `skip_special` leaves out special tokens such as an end of turn, except those in `shown`.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special: bool = True, shown: frozenset[int] = frozenset()
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._shown = shown
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # Whether the bytes so far end within a character.
        self._is_within = False
        self._is_at_start = tokenizer.strips_first_space

    def push(self, token_id: int) -> str:
        """Decode one token and return the text that is certain now; empty within a character."""
        if not (self._is_within or self._is_at_start):
            # Nearly all tokens of most answers, several times as fast.
            known = self._tokenizer.text_cache.get(token_id)
            if known is not None:
                return known
        if self._skip_special and token_id not in self._shown and self._tokenizer.is_special(token_id):
            return ""
        content = self._tokenizer.token_bytes(token_id)
        if self._is_at_start and content:
            self._is_at_start = False
            content = content.removeprefix(b" ")
        text = self._utf8.decode(content)
        self._is_within = bool(self._utf8.getstate()[0])
        if not self._is_within:
            self._tokenizer.cache_text(token_id)
        return text

    def flush(self) -> str:
        """Return the rest: U+FFFD for a character that was never completed, or nothing."""
        return self._utf8.decode(b"", final=True)
