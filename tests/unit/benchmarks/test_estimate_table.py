"""The table of estimates beside runs: medians, errors, and what is over a bar."""

from typing import Any

from benchmarks.estimate import make_table


def _row(estimated: float, measured: list[float], bytes_: tuple[int, int]) -> dict[str, Any]:
    return {
        "estimate": {"seconds": {"load": 1.0, "train": estimated - 1.0}, "peak_memory_bytes": bytes_[0]},
        "runs": [
            {"seconds": {"load": 1.0, "train": one - 1.0}, "peak_memory_bytes": bytes_[1]} for one in measured
        ],
    }


def test_errors_are_those_of_the_medians_and_bold_over_their_bars() -> None:
    mebibyte = 2**20
    rows = {
        "calibration": {"constants": {}},
        "lora": _row(12.0, [10.0, 9.0, 30.0], (1100 * mebibyte, 1000 * mebibyte)),
        "full": _row(14.0, [10.0], (1200 * mebibyte, 1000 * mebibyte)),
        "prompt": {"estimate": {"seconds": None}, "runs": [{}]},
    }
    table = make_table(rows).splitlines()
    assert table[2] == "| full | 1 | 14.0 | 10.0 | **+40%** | **+44%** | 1,200 | 1,000 | **+20%** |"
    assert table[3] == "| lora | 3 | 12.0 | 10.0 | +20% | +22% | 1,100 | 1,000 | +10% |"
    assert len(table) == 4
