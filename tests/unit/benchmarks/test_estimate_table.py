"""The table of estimates beside runs: medians, errors, and what is over a bar."""

from typing import Any

from benchmarks.estimate import make_table


def _row(before: float, after: float, measured: list[float], bytes_: tuple[int, int]) -> dict[str, Any]:
    def phases(total: float) -> dict[str, float]:
        return {"load": 1.0, "train": total - 1.0}

    return {
        "estimate": {"before": phases(before), "after": phases(after), "peak_memory_bytes": bytes_[0]},
        "runs": [
            {"report": {"seconds": phases(one) | {"tokenize": 9.0}, "peak_memory_bytes": bytes_[1]}}
            for one in measured
        ],
    }


def test_errors_are_those_of_the_medians_and_bold_over_their_bars():
    mebibyte = 2**20
    rows = {
        "speed": {"device": {}},
        "lora": _row(13.0, 11.0, [10.0, 9.0, 30.0], (1100 * mebibyte, 1000 * mebibyte)),
        "full": _row(14.0, 12.5, [10.0], (1200 * mebibyte, 1000 * mebibyte)),
        "prompt": {"runs": []},
    }
    table = make_table(rows).splitlines()
    assert table[2] == ("| full | 1 | 10.0 | 14.0 | **+40%** | 12.5 | **+25%** | 1,000 | 1,200 | **+20%** |")
    assert table[3] == "| lora | 3 | 10.0 | 13.0 | +30% | 11.0 | +10% | 1,000 | 1,100 | +10% |"
    assert len(table) == 4
