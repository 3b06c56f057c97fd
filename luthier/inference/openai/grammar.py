"""What an answer's text must be, enforced token by token by llguidance. Knows no requests and no tensors.

A grammar is compiled once for a tokenizer and kept; every answer has its own place in it. Grammars are
written in llguidance's dialect of Lark, in which `%json` takes a JSON schema.
"""

import hashlib
import json
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from luthier.core.errors import InvalidRequestError, InvalidValueError
from luthier.data.rendering.tokenizer import Tokenizer

# A grammar's memory grows with the time that it took: 100 to 200 MiB a second.
_MAX_KEPT, _MAX_KEPT_SECONDS = 64, 1.0
_MAX_MESSAGE_CHARS = 160
# States are of one or two kB each; a pattern can ask for any number of them. With these, and a budget of
# schemas, no shape that was found takes more than 2 s and 50 MiB to compile or 100 ms for one token
# (fuel 1,000,000 and 500,000 symbols, the library's own: 300 MiB and 0.6 s for a token).
_LIMITS = LLParserLimits(
    verbose_errors=False,
    initial_lexer_fuel=300_000,
    max_grammar_size=60_000,
    max_lexer_states=20_000,
    step_max_items=8_000,
)
# Of all grammars of a request; one that has begun is not broken off.
COMPILE_SECONDS = 5.0
# A model that may write any whitespace between two tokens of JSON can write nothing else for ever.
_WHITESPACE = r"[ ]|\n[ ]{0,40}"


def json_rule(schema: dict[str, Any], *, param: str) -> str:
    """Return what stands in a grammar for JSON of a schema.

    Args:
        schema: a JSON schema; `{}` for any value.
        param: the field that it comes from, for the error.

    Raises:
        InvalidValueError: when the schema is nested too deeply to be written down.
    """
    guided = schema | {"x-guidance": {"whitespace_pattern": _WHITESPACE}}
    try:
        return f"%json {json.dumps(guided)}"
    except RecursionError as error:
        raise InvalidValueError("The schema is nested too deeply.", param=param) from error


class TokenGrammar:
    """One answer's place in a grammar; for the engine's thread only.

    Args:
        stop_token_ids: tokens that end an answer.
    """

    def __init__(self, matcher: LLMatcher, stop_token_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._stop_token_ids = stop_token_ids

    @property
    def is_finished(self) -> bool:
        """Whether the text is whole and nothing may follow."""
        return self._matcher.is_stopped()

    def allows(self, token_id: int) -> bool:
        """Whether a token may come next."""
        if token_id in self._stop_token_ids:
            return self._matcher.is_accepting()
        return self._matcher.validate_tokens([token_id]) == 1

    def mask(self) -> npt.NDArray[np.bool_]:
        """Return which tokens may come next.

        Returns:
            bool, one for each token of the tokenizer, and up to 31 more that are False.

        Raises:
            InvalidRequestError: when the grammar has become too costly to follow.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, bitorder="little").view(np.bool_)

    def push(self, token_id: int) -> None:
        """Take the token that came.

        Args:
            token_id: one that is allowed, and does not end the answer.

        Raises:
            InvalidRequestError: when it is not allowed, or the grammar has become too costly to follow.
        """
        self._matcher.consume_token(token_id)
        self._check()

    def _check(self) -> None:
        # The matcher's own words quote the answer.
        if self._matcher.is_error():
            raise InvalidRequestError(
                f"The answer could not be held to its format ({self._matcher.stop_reason()}). "
                "Simplify the schema."
            )


class CompiledGrammar:
    """A grammar for one tokenizer, from which every answer starts.

    Args:
        matcher: at the beginning of the text; never moved.
        stop_token_ids: tokens that end an answer.
    """

    def __init__(self, matcher: LLMatcher, stop_token_ids: frozenset[int]) -> None:
        self._matcher = matcher
        self._stop_token_ids = stop_token_ids

    def start(self) -> TokenGrammar:
        """Return the grammar as one answer follows it."""
        return TokenGrammar(self._matcher.deep_copy(), self._stop_token_ids)


class _Vocabulary:
    """A tokenizer as llguidance asks for one; its attributes' names are the library's."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer) -> None:
        ids = range(tokenizer.vocab_size)
        self._tokenizer = tokenizer
        self.eos_token_id = min(tokenizer.stop_token_ids)
        self.tokens = [tokenizer.token_bytes(token_id) for token_id in ids]
        self.special_token_ids = [token_id for token_id in ids if tokenizer.is_special(token_id)]

    def __call__(self, text: str | bytes) -> list[int]:
        return self._tokenizer.encode(text if isinstance(text, str) else text.decode(errors="replace"))


class Grammars:
    """Compiled grammars, the last few of which are kept. Any thread may call it; the event loop may not."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokenizers: dict[str, LLTokenizer] = {}
        self._kept: OrderedDict[str, CompiledGrammar] = OrderedDict()
        self._seconds: dict[str, float] = {}

    def compile(
        self,
        lark: str,
        tokenizer: Tokenizer,
        tokenizer_digest: str,
        *,
        param: str,
        deadline: float | None = None,
    ) -> CompiledGrammar:
        """Compile a grammar for a tokenizer. Takes up to a second for a tokenizer that is new.

        Args:
            param: the field that the grammar comes from, for the error.
            deadline: of time.monotonic(), after which none is compiled that is not kept.

        Raises:
            InvalidValueError: when it can't be compiled, which is for a schema's reasons.
        """
        if not tokenizer.stop_token_ids:
            raise InvalidValueError(
                "This model names no token that ends an answer, so its answers can't be held to a form.",
                param=param,
            )
        key = hashlib.sha256(f"{tokenizer_digest}\n{lark}".encode()).hexdigest()
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            inner = self._tokenizers.get(tokenizer_digest)
            if inner is None:
                stops = sorted(tokenizer.stop_token_ids)
                inner = LLTokenizer(_Vocabulary(tokenizer), tokenizer.vocab_size, stops)  # type: ignore[arg-type]
                self._tokenizers[tokenizer_digest] = inner
        began = time.monotonic()
        if deadline is not None and began > deadline:
            raise InvalidValueError(
                f"The request's schemas take more than {COMPILE_SECONDS:.0f} s to compile. Simplify them.",
                param=param,
            )
        # Silent: its warnings would quote answers on the server's stderr.
        matcher = LLMatcher(inner, lark, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise InvalidValueError(f"The schema can't be enforced: {_reason(matcher)}", param=param)
        compiled = CompiledGrammar(matcher, tokenizer.stop_token_ids)
        try:
            # What is too costly to begin is refused here, and costs the engine's thread nothing.
            compiled.start().mask()
        except InvalidRequestError as error:
            raise InvalidValueError(
                "The schema can't be enforced: it is too complex.", param=param
            ) from error
        with self._lock:
            self._kept[key] = compiled
            self._seconds[key] = time.monotonic() - began
            self._drop_oldest()
        return compiled

    def _drop_oldest(self) -> None:
        while len(self._kept) > _MAX_KEPT or (
            len(self._kept) > 1 and sum(self._seconds.values()) > _MAX_KEPT_SECONDS
        ):
            key, _ = self._kept.popitem(last=False)
            del self._seconds[key]


def _reason(matcher: LLMatcher) -> str:
    """Return the library's first line, less its position in a grammar that the client never saw."""
    line = matcher.get_error().partition("\n")[0]
    if "panic" in line or "fuel" in line or "too big" in line:
        return "it is too complex."
    _, mark, reason = line.partition("failed to compile JSON schema: ")
    return (reason if mark else line)[:_MAX_MESSAGE_CHARS] or "it is too complex."


_MAX_BYTES = 256 * 1024
_MAX_VALUES = 20_000
# A constant or a pattern is a state for each of its characters, and is copied while answers follow it.
_MAX_TEXT_CHARS = 16 * 1024
# A divisor becomes an automaton with as many states as its digits say (99.99 has 9,999), and several of one
# number one with their least common multiple: 50,000 states take 0.3 s and 24 MiB to compile.
_MAX_DIVISOR_SUM = 50_000
_MAX_COMMON_MULTIPLE = 100_000


class SchemaBudget:
    """The budget of a request: all its schemas together stay within it."""

    def __init__(self) -> None:
        self._num_bytes = self._num_values = 0
        self._divisors: set[Decimal] = set()

    def take(self, schema: dict[str, Any], *, param: str) -> None:
        """Count a schema; one that is refused is not counted.

        Raises:
            InvalidValueError: when it does not fit with those before it.
        """
        values = list(_walk(schema))
        num_bytes = self._num_bytes + len(json.dumps(schema, ensure_ascii=False).encode())
        num_values = self._num_values + len(values)
        if num_bytes > _MAX_BYTES or num_values > _MAX_VALUES:
            raise InvalidValueError(
                f"The schemas of a request may have {_MAX_BYTES // 1024} KiB and {_MAX_VALUES} JSON values "
                "in all. Simplify them.",
                param=param,
            )
        if any(isinstance(value, str) and len(value) > _MAX_TEXT_CHARS for _, value in values):
            raise InvalidValueError(
                f"A text within a schema may have {_MAX_TEXT_CHARS} characters at most.", param=param
            )
        divisors = self._divisors | {
            Decimal(repr(value))
            for name, value in values
            if name == "multipleOf" and isinstance(value, int | float) and value > 0
        }
        if not _are_cheap(divisors):
            raise InvalidValueError(
                f"The values of multipleOf, digits without the point, may add up to {_MAX_DIVISOR_SUM}, and "
                f"their least common multiple may be {_MAX_COMMON_MULTIPLE}. Leave some out.",
                param=param,
            )
        self._num_bytes, self._num_values, self._divisors = num_bytes, num_values, divisors


def _walk(schema: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Give every value of a schema with the name that it, or the list that holds it, has."""
    remaining: list[tuple[str, Any]] = [("", schema)]
    while remaining:
        name, value = remaining.pop()
        yield name, value
        if isinstance(value, dict):
            remaining += value.items()
        elif isinstance(value, list):
            remaining += [(name, item) for item in value]


def _are_cheap(divisors: set[Decimal]) -> bool:
    # Beyond this the sum is too large anyway, and Python's integers would grow without a bound.
    if any(not -20 < divisor.adjusted() < 20 or len(divisor.as_tuple().digits) > 20 for divisor in divisors):
        return False
    digits = [_digits(divisor, 0) for divisor in divisors]
    num_places = max((_num_places(divisor) for divisor in divisors), default=0)
    common = math.lcm(*(_digits(divisor, num_places) for divisor in divisors))
    return sum(digits) <= _MAX_DIVISOR_SUM and common <= _MAX_COMMON_MULTIPLE * 10**num_places


def _num_places(divisor: Decimal) -> int:
    return max(0, -int(divisor.normalize().as_tuple().exponent))


def _digits(divisor: Decimal, num_places: int) -> int:
    """Return a number's digits without its point, at `num_places` decimal places or all that it has."""
    return int(divisor.scaleb(max(num_places, _num_places(divisor))))
