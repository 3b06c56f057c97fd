"""`luthier jobs estimate` for a person: numbers where there are any, the reason where there are none."""

from typing import Any

import pytest

from luthier.cli.commands.jobs import job_body
from luthier.cli.commands.reports import print_estimate
from luthier.core.errors import InvalidValueError


def _estimate(**changes: Any) -> dict[str, Any]:
    rows = {"total": 9000, "counted": 4000, "is_sampled": True, "train": 8990, "validation": 0}
    return {
        "rows": rows,
        "tokens": 900,
        "supervised_tokens": 300,
        "trained_tokens": 2700,
        "steps": 12,
        "hyperparameters": {"n_epochs": 3, "batch_size": 8},
        "training": {"learning_rate": 0.001},
        "tuning": {"type": "lora", "rank": 16},
        "num_trained_parameters": 4,
        "artifact_bytes": 1024**2,
        "seconds": {"total": 3.5, "load": 1.0, "train": 2.5},
        "peak_memory_bytes": 3 * 1024**2,
        "basis": {"device": "cpu\x1b[1m", "precision": "float32", "num_threads": 2, "finished_jobs": 1},
        "reason": None,
        "warnings": ["Too long."],
        **changes,
    }


def test_seconds_and_memory_are_printed_with_what_they_rest_on(capsys):
    print_estimate(_estimate())
    printed = capsys.readouterr().out
    assert "rows: 9000, 4000 of them counted; 8990 to train on" in printed
    assert "seconds: 3.5 (load 1.0, train 2.5); memory: 3.0 MiB" in printed
    assert 'hyperparameters: {"n_epochs": 3, "batch_size": 8, "learning_rate": 0.001}' in printed
    assert "by 1 finished job on cpu" in printed
    assert "warning: Too long." in printed
    assert "\x1b" not in printed


def test_without_a_measurement_the_reason_is_printed(capsys):
    nothing = dict.fromkeys(("seconds", "peak_memory_bytes", "basis", "artifact_bytes"))
    print_estimate(_estimate(**nothing, reason="No worker has measured it.", warnings=[]))
    printed = capsys.readouterr().out
    assert "not known. No worker has measured it." in printed
    assert "artifact: -" in printed


def _body(**options: str) -> dict[str, Any]:
    given = dict.fromkeys(("method", "tuning", "training", "hyperparameters"), None) | options
    return job_body("base", **given)


def test_an_option_must_hold_a_json_object():
    assert _body() == {"model": "base"}
    assert _body(tuning='{"type": "full"}')["tuning"] == {"type": "full"}
    for wrong in ("{", "[1]"):
        with pytest.raises(InvalidValueError, match="--tuning"):
            _body(tuning=wrong)


def test_a_method_is_a_way_to_tune_an_objective_or_the_requests_own_object():
    assert _body(method="prefix") == {"model": "base", "tuning": {"type": "prefix"}}
    assert _body(method="lora", tuning='{"rank": 4}')["tuning"] == {"type": "lora", "rank": 4}
    assert _body(method="dpo") == {"model": "base", "method": {"type": "dpo"}}
    assert _body(method='{"type": "dpo"}')["method"] == {"type": "dpo"}
    with pytest.raises(InvalidValueError, match=r"lora.*full"):
        _body(method="lora", tuning='{"type": "full"}')
