"""The peak rates of "auto", by what was measured (docs/methods.md) or is usual."""

import pytest

from luthier.methods._tuning import check_tuning, parse_tuning
from tests.unit.methods.test_virtual import facts


@pytest.mark.parametrize(
    ("kind", "hidden_size", "expected"),
    [("full", 576, 5e-5), ("full", 4096, 2e-5), ("prompt", 576, 0.3), ("prompt", 4096, 0.1)],
)
def test_a_rate_depends_on_the_method_and_the_width(kind: str, hidden_size: int, expected: float) -> None:
    method, params = parse_tuning(check_tuning({"type": kind}))
    assert method.base_learning_rate(params, base=facts(hidden_size=hidden_size)) == expected
