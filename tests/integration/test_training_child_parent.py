"""Runs that continue a tuned model: its scores to the bit at the start, exact resumes, and refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from luthier.core.events import RunReport
from luthier.core.specs import TrainingSpec
from luthier.methods import discover
from luthier.storage.manifests import read_manifest, seal_folder
from luthier.training.model import continuation as parent_module
from tests.tiny import Parent, build_tiny_base, build_tiny_run
from tests.training_runs import failed, finished, run_here, run_killed_everywhere

METHODS = list(discover())
WHOLE = next(name for name in METHODS if discover()[name].is_whole_model)
# One epoch of three steps, a save point before its end.
SETTINGS: dict[str, Any] = {
    "num_rows": 12,
    "num_validation_rows": 3,
    "hyperparameters": {"n_epochs": 1, "batch_size": 4},
    "training": {"save_every_steps": 2, "learning_rate": 5e-3},
}


class Trained:
    """A run that has ended: its report, and its artifact as a parent of others."""

    def __init__(self, folder: Path) -> None:
        self.event = finished(run_here(folder))
        spec = TrainingSpec.model_validate_json((folder / "spec.json").read_bytes())
        self.tuning = spec.tuning
        self.parent = Parent(folder / "artifact", str(spec.tuning["type"]), self.event.digest)

    @property
    def report(self) -> RunReport:
        return self.event.report


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    folder = tmp_path_factory.mktemp("parents")
    return {
        name: Trained(build_tiny_run(folder / name, base, **SETTINGS, tuning={"type": name}))
        for name in METHODS
    }


def resume(folder: Path, base: Path, origin: Trained, **changes: Any) -> Path:
    """Write a run directory that continues from a trained model, by its own method."""
    return build_tiny_run(
        folder, base, **(SETTINGS | {"tuning": origin.tuning, "parent": origin.parent} | changes)
    )


def scores(report: RunReport, place: int) -> dict[str, float]:
    return report.evaluations[place].scores


@pytest.mark.parametrize("method", METHODS)
def test_a_run_continues_from_its_parents_scores_to_the_bit_and_says_so(
    method: str, base: Path, tmp_path: Path, trained: dict[str, Trained]
) -> None:
    parent = trained[method]
    event = finished(run_here(resume(tmp_path / "run", base, parent)))
    report = event.report
    assert (report.started_from.name, report.started_from.digest) == (
        parent.parent.model.name,
        parent.event.digest,
    )
    # The same weights on the same rows in the same order of sums.
    assert scores(report, 0) == scores(parent.report, -1)
    assert report.base_evaluation.scores == scores(parent.report, 0)
    # Forgetting is what this job has done.
    gone = report.evaluations[-1].scores["general_loss"] - scores(parent.report, -1)["general_loss"]
    assert report.evaluations[-1].forgetting == pytest.approx(gone)
    assert report.evaluations[0].forgetting is None
    assert event.digest != parent.event.digest
    assert scores(report, -1) != scores(report, 0)
    assert read_manifest(tmp_path / "run" / "artifact").base_digest == report.base_digest
    first = json.loads((tmp_path / "run" / "artifact" / "training_log.jsonl").read_text().splitlines()[0])
    assert {"base_general_loss", "start_general_loss"} < set(first)
    assert parent.event.digest in (tmp_path / "run" / "artifact" / "README.md").read_text()


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_continues_and_is_stopped_ends_with_the_undisturbed_digest(
    method: str, base: Path, tmp_path: Path, trained: dict[str, Trained]
) -> None:
    expected = finished(run_here(resume(tmp_path / "undisturbed", base, trained[method])))
    folder = resume(tmp_path / "run", base, trained[method])
    run_here(folder, term_after=lambda event: event.type == "step" and event.step == 2)
    # The next attempt has the save point, the parent and nothing else.
    again = resume(tmp_path / "again", base, trained[method])
    shutil.copytree(folder / "save_points" / "step-000002", again / "save_points" / "step-000002")
    found = finished(run_here(again))
    assert found.digest == expected.digest
    assert found.report.evaluations == expected.report.evaluations
    assert found.report.base_evaluation == expected.report.base_evaluation


def test_a_run_that_continues_and_is_killed_after_every_event_gives_the_undisturbed_digest(
    base: Path, tmp_path: Path, trained: dict[str, Trained]
) -> None:
    parent = trained["lora"]
    settings = {"tuning": parent.tuning | {"dropout": 0.2}}
    expected = finished(run_here(resume(tmp_path / "undisturbed", base, parent, **settings)))
    folder = resume(tmp_path / "killed", base, parent, **settings)
    num_kills, events = run_killed_everywhere(folder)
    # Started, 3 steps, a save point, a checkpoint, 2 evaluations.
    assert num_kills == 8
    assert finished(events).digest == expected.digest
    assert finished(events).report.base_evaluation == expected.report.base_evaluation


def test_a_prefix_continues_through_a_new_projection(
    base: Path, tmp_path: Path, trained: dict[str, Trained]
) -> None:
    tuning = trained["prefix"].tuning | {"projection": True, "projection_dim": 8}
    folder = resume(tmp_path / "run", base, trained["prefix"], tuning=tuning)
    events = run_here(folder, term_after=lambda event: event.type == "step" and event.step == 2)
    assert events[-1].type == "stopped"
    report = finished(run_here(folder)).report
    assert scores(report, 0) == scores(trained["prefix"].report, -1)
    undisturbed = resume(tmp_path / "undisturbed", base, trained["prefix"], tuning=tuning)
    assert report.artifact_digest == finished(run_here(undisturbed)).digest


@pytest.mark.parametrize("method", [name for name in METHODS if name != WHOLE])
def test_after_a_whole_model_any_method_starts_on_it_and_continues_there(
    method: str, base: Path, tmp_path: Path, trained: dict[str, Trained]
) -> None:
    whole = trained[WHOLE]
    on_whole = {"tuning": {"type": method}, "parent": whole.parent, "foundation": whole.parent}
    first = Trained(build_tiny_run(tmp_path / "first", base, **SETTINGS, **on_whole))
    manifest = read_manifest(first.parent.folder)
    assert manifest.base_digest == whole.event.digest
    config = json.loads((first.parent.folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == whole.parent.model.name
    assert whole.parent.model.name in (first.parent.folder / "README.md").read_text()
    # Step 0 is the whole model itself, even where the method does not start as the model below it.
    assert scores(first.report, 0) == scores(whole.report, -1)
    second = finished(run_here(resume(tmp_path / "second", base, first, foundation=whole.parent)))
    assert scores(second.report, 0) == scores(first.report, -1)
    assert read_manifest(tmp_path / "second" / "artifact").base_digest == whole.event.digest
    # On the base itself, which has the same shapes, it must not continue.
    event = failed(run_here(resume(tmp_path / "wrong", base, first)))
    assert event.code == "unsuitable_parent"


def _other_bytes(folder: Path, parent: Parent) -> Parent:
    shutil.copytree(parent.folder, folder)
    path = folder / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return Parent(folder, parent.method, parent.digest)


def _other_model(folder: Path, parent: Parent) -> Parent:
    """The same files with one more in the digest: another model than the spec names."""
    shutil.copytree(parent.folder, folder.with_name("building"))
    names = [*read_manifest(parent.folder).digested, "README.md"]
    base_digest = read_manifest(parent.folder).base_digest
    seal_folder(folder.with_name("building"), folder, digested=names, base_digest=base_digest)
    return Parent(folder, parent.method, parent.digest)


def test_a_parent_of_other_bytes_or_another_digest_is_refused_before_a_step(
    base: Path, tmp_path: Path, trained: dict[str, Trained]
) -> None:
    lora = trained["lora"]
    for make, code in ((_other_bytes, "artifact_corrupt"), (_other_model, "unsuitable_parent")):
        parent = make(tmp_path / make.__name__ / "artifact", lora.parent)
        events = run_here(resume(tmp_path / make.__name__ / "run", base, lora, parent=parent))
        assert failed(events).code == code
        assert [event.type for event in events] == ["failed"]


def test_a_parent_of_another_base_another_shape_or_another_method_is_refused(
    base: Path, tmp_path: Path, trained: dict[str, Trained]
) -> None:
    lora = trained["lora"]
    other_base = build_tiny_base(tmp_path / "other", seed=1)
    runs = {
        "base": resume(tmp_path / "base", other_base, lora),
        "shape": resume(tmp_path / "shape", base, lora, tuning=lora.tuning | {"rank": 2}),
        "layers": resume(tmp_path / "layers", base, lora, tuning=lora.tuning | {"target_modules": "mlp"}),
        "method": resume(tmp_path / "method", base, lora, tuning={"type": "adapter"}),
    }
    for name, folder in runs.items():
        event = failed(run_here(folder))
        assert (event.code, event.is_retryable) == ("unsuitable_parent", False), name


def test_weights_that_mean_something_else_are_seen_by_their_logits(
    base: Path, tmp_path: Path, trained: dict[str, Trained]
) -> None:
    lora = trained["lora"]
    folder = resume(tmp_path / "run", base, lora, tuning=lora.tuning | {"alpha": 1.0})
    events = run_here(folder)
    assert failed(events).code == "self_check_failed"
    assert not any(event.type == "step" for event in events)


def test_a_run_that_learns_nothing_beyond_its_parent_fails(
    base: Path, tmp_path: Path, trained: dict[str, Trained], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("luthier.training.loop.loop.apply_gradients", lambda *_, **__: None)
    event = failed(run_here(resume(tmp_path / "run", base, trained["lora"])))
    assert event.code == "self_check_failed"
    assert "started from" in event.message


def test_an_ordinary_run_proves_no_parent_and_its_spec_is_the_text_it_always_was(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("an ordinary run must not pay for this")

    monkeypatch.setattr(parent_module, "verify_folder", never)
    monkeypatch.setattr(parent_module, "bare_base", never)
    folder = build_tiny_run(tmp_path / "run", base, **SETTINGS)
    assert "parent" not in (folder / "spec.json").read_text()
    report = finished(run_here(folder)).report
    assert (report.started_from, report.base_evaluation) == (None, None)
