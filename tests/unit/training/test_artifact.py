"""The log that survives a resume, and a card that no value can break out of."""

import json
from pathlib import Path

from luthier.training.artifact import TrainingLog, _code


def test_lines_of_steps_that_will_be_done_again_are_dropped_and_half_a_line_too(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    lines = [json.dumps({"step": step, "train_loss": 1.0}) for step in (0, 1, 2, 3)]
    path.write_text("\n".join(lines) + '\n{"step": 4, "tra')
    log = TrainingLog(path, last_step=2)
    log.append(step=3, train_loss=0.5)
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in kept] == [0, 1, 2, 3]
    assert kept[-1]["train_loss"] == 0.5


def test_a_value_stays_inside_its_cell() -> None:
    assert _code("a`|b\n# c\u202e") == "`a  b # c `"
    assert _code(["x"]) == '`["x"]`'
