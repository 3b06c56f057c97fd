"""A step is proved once, however often it is written; another step is proved anew."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from luthier.core.errors import SelfCheckError
from luthier.core.events import Metrics
from luthier.training.output import checkpoints as publish
from luthier.training.output.checkpoints import Publisher


class _JobModel:
    """Counts its proofs; the first may fail."""

    def __init__(self, *, fails: bool = False) -> None:
        self.num_proofs = 0
        self._fails = fails

    def verify(self, _samples: object) -> None:
        self.num_proofs += 1
        if self._fails and self.num_proofs == 1:
            raise SelfCheckError("off")


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, Any]]:
    """What is written: the step and the canary of each artifact."""
    found: list[tuple[int, Any]] = []

    def write(*_: object, step: int, canary: Any, **__: object) -> SimpleNamespace:
        found.append((step, canary))
        return SimpleNamespace(digest="sha256:" + "0" * 64)

    monkeypatch.setattr(publish, "write_artifact", write)
    monkeypatch.setattr(publish, "check_artifact", lambda *_: None)
    monkeypatch.setattr(publish, "record_canary", lambda *_: object())
    return found


def _publisher(job_model: _JobModel, folder: Path) -> Publisher:
    options = SimpleNamespace(keep_best=False, max_forgetting=None)
    job: Any = SimpleNamespace(folder=folder, origin=None, spec=SimpleNamespace(training=options))
    writer: Any = SimpleNamespace(job_id="job", emit=lambda _event: None)
    return Publisher(job, job_model, writer, samples=[None], general_ids=[], log=folder / "log")  # type: ignore[arg-type]


def test_the_result_of_a_step_whose_checkpoint_was_proved_is_not_proved_again(tmp_path, written):
    job_model = _JobModel()
    publisher = _publisher(job_model, tmp_path)
    publisher.write_checkpoint(3, Metrics(), is_chosen=True)
    publisher.write_checkpoint(6, Metrics(), is_chosen=True)
    publisher.write_result(tmp_path / "artifact", 6, Metrics())
    assert job_model.num_proofs == 2
    assert [step for step, _ in written] == [3, 6, 6]
    assert written[1][1] is written[2][1]
    assert written[0][1] is not written[1][1]


def test_a_proof_that_failed_is_not_remembered(tmp_path, written):
    job_model = _JobModel(fails=True)
    publisher = _publisher(job_model, tmp_path)
    with pytest.raises(SelfCheckError):
        publisher.write_checkpoint(3, Metrics(), is_chosen=True)
    assert written == []
    publisher.write_checkpoint(3, Metrics(), is_chosen=True)
    assert job_model.num_proofs == 2
