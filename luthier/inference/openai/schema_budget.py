"""What the JSON schemas of one request may cost, known before any is compiled. Compiles nothing."""

import json
import math
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

from luthier.core.errors import InvalidValueError

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
