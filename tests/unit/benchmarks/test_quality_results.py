"""Kept cells, hand-set recipes and the table of the quality measurement."""

from pathlib import Path

import pytest

from benchmarks.quality.recipes import RECIPES, find_recipe
from benchmarks.quality.results import Cell, Results, Size
from benchmarks.quality.routing import make_routing
from benchmarks.quality.table import BEGIN, END, NOT_MEASURED, render, write_into
from benchmarks.quality.train import with_recipe
from luthier.core.specs import Hyperparameters, TrainingSpec
from luthier.methods import discover
from luthier.methods._tuning import check_tuning

_SIZE = Size(500, 200, None)
_MACHINE = {"processor": "a processor", "num_threads": 1, "base": "a-base"}
_COSTS = {
    "forgetting": 0.05,
    "num_parameters": 1000,
    "artifact_bytes": 4_000_000,
    "train_seconds": 61.4,
    "processor_seconds": 61.4,
    "peak_memory_bytes": 900_000_000,
}


def _results(folder: Path, *cells: tuple[Cell, dict[str, object]]) -> Results:
    results = Results(folder / "quality.json")
    for cell, measured in cells:
        results.store(cell, _SIZE, {"machine": _MACHINE, **measured})
    return results


def test_a_stored_cell_is_found_by_the_next_measurement_of_the_same_size_only(tmp_path):
    cell = Cell("routing", "lora", "auto", 1)
    _results(tmp_path, (cell, {"scores": {"accuracy": 50.0}}))
    again = Results(tmp_path / "quality.json")
    found = again.find(cell, _SIZE)
    assert found["scores"] == {"accuracy": 50.0}
    assert again.find(cell, Size(20, 8, 1)) is None
    assert again.find(Cell("routing", "lora", "auto", 2), _SIZE) is None


def test_a_cell_measured_again_replaces_the_older_one(tmp_path):
    cell = Cell("routing", "lora", "auto", 1)
    results = _results(tmp_path, (cell, {"scores": {"accuracy": 1.0}}), (cell, {"scores": {"accuracy": 2.0}}))
    assert [entry["scores"]["accuracy"] for entry in results.of_size(_SIZE)] == [2.0]


def test_the_table_shows_mean_and_spread_and_the_best_recipe(tmp_path):
    results = _results(
        tmp_path,
        (Cell("routing", "base", "0-shot", 1), {"scores": {"accuracy": 12.5}}),
        (Cell("routing", "lora", "auto", 1), {"scores": {"accuracy": 70.0}, **_COSTS}),
        (Cell("routing", "lora", "auto", 2), {"scores": {"accuracy": 80.0}, **_COSTS}),
        (Cell("routing", "lora", "slow", 1), {"scores": {"accuracy": 60.0}, **_COSTS}),
        (Cell("routing", "lora", "fast", 1), {"diverged": "non_finite_loss"}),
    )
    table = render(results, _SIZE, ["lora"], frozenset({"e2e"}))
    (line,) = [line for line in table.splitlines() if "| lora |" in line]
    assert "accuracy % 75.0 (70.0 to 80.0)" in line
    assert "**slow 60.0**; fast diverged" in line
    assert "| +0.050 | 1,000 | 4,000 kB | 61 | 900 MB |" in line
    assert "base, 0 examples in the prompt | accuracy % 12.5 |" in table
    assert "| E2E text | data set absent |" in table
    widths = {line.count(" | ") for line in table.splitlines() if line.startswith("|") and "lora" in line}
    assert widths == {8}


def test_the_table_says_which_task_was_measured_where(tmp_path):
    for task, name in (("routing", "one"), ("orders", "two"), ("routing", "one")):
        results = Results(tmp_path / "quality.json")
        machine = _MACHINE | {"processor": name}
        results.store(Cell(task, "lora", "auto", 1), _SIZE, {"machine": machine, "diverged": "no_number"})
    text = render(results, _SIZE, ["lora"])
    assert "base a-base. Measured on one, 1 threads (CPU): routing, 8 labels; two, 1 threads (CPU): " in text


def test_without_cells_the_table_says_that_nothing_was_measured(tmp_path):
    assert render(Results(tmp_path / "none.json"), _SIZE, ["lora"]) == NOT_MEASURED


def test_the_table_goes_between_the_marks_and_replaces_what_was_there(tmp_path):
    document = tmp_path / "methods.md"
    document.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_into(document, "| new |")
    write_into(document, "| newer |")
    assert document.read_text() == f"before\n{BEGIN}\n\n| newer |\n\n{END}\nafter\n"


def test_a_document_without_marks_is_left_alone(tmp_path):
    document = tmp_path / "methods.md"
    document.write_text("nothing")
    with pytest.raises(SystemExit):
        write_into(document, "| new |")


@pytest.mark.parametrize("method", sorted(set(RECIPES) & set(discover())))
def test_every_method_has_three_recipes_that_the_service_accepts(method):
    task = make_routing(8, 8)
    automatic = TrainingSpec(
        base_id="base",
        tuning=check_tuning({"type": method}),
        hyperparameters=Hyperparameters(n_epochs=3, batch_size=4),
        seed=1,
    )
    assert len(RECIPES[method]) == 3
    for recipe in RECIPES[method]:
        assert find_recipe(method, recipe.name) is recipe
        spec = with_recipe(automatic, recipe, task)
        assert spec.tuning["type"] == method
        assert "{description}" not in spec.tuning.values()
        assert spec.hyperparameters == automatic.hyperparameters
        assert spec.training.learning_rate == recipe.learning_rate


def test_every_method_has_recipes():
    assert set(discover()) <= set(RECIPES)
