"""The log that goes on after a resume, and a card that no value can break out of."""

import json
from pathlib import Path

from luthier.training.artifact import TrainingLog, _code


def test_a_log_goes_on_from_its_save_point_and_forgets_steps_that_will_be_done_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "tra')
    log = TrainingLog(path, '{"step": 1}\n')
    log.append(step=2, train_loss=0.5)
    assert [json.loads(line)["step"] for line in log.read().splitlines()] == [1, 2]


def test_a_value_stays_inside_its_cell() -> None:
    assert _code("a`|b\n# c\u202e") == "`a  b # c `"
    assert _code(["x"]) == '`["x"]`'
