"""What the quality measurement measures, and in which order."""

import argparse

from benchmarks.quality.__main__ import cells_of, choose_examples
from benchmarks.quality.recipes import RECIPES
from benchmarks.quality.results import Cell
from benchmarks.quality.routing import make_routing
from luthier.methods import discover


def _cells(**asked: list[str] | list[int] | None) -> list[Cell]:
    options = {"method": None, "seed": None, "recipe": None} | asked
    return list(cells_of(["routing", "orders"], argparse.Namespace(**options)))


def test_everything_is_measured_by_default_with_two_seeds_and_no_cell_twice():
    cells = _cells()
    num_methods = len(discover())
    num_recipes = sum(len(RECIPES[method]) for method in discover())
    # Per task: the base without examples once, with four examples and every model with both seeds.
    assert len(cells) == 2 * (1 + 2 + 2 * num_methods + 2 * num_recipes)
    assert len(set(cells)) == len(cells)


def test_what_the_table_needs_most_is_measured_first():
    kinds = ["base" if c.model == "base" else "auto" if c.recipe == "auto" else "hand" for c in _cells()]
    assert kinds == sorted(kinds, key=["base", "auto", "hand"].index)


def test_a_part_can_be_asked_for():
    assert _cells(method=["lora"], seed=[3], recipe=["auto"]) == [
        Cell("routing", "lora", "auto", 3),
        Cell("orders", "lora", "auto", 3),
    ]
    assert [cell.recipe for cell in _cells(method=["full"], seed=[1], recipe=["hand"])] == [
        recipe.name for _ in range(2) for recipe in RECIPES["full"]
    ]
    name = RECIPES["lora"][0].name
    assert {cell.model for cell in _cells(recipe=[name]) if cell.model != "base"} == {"lora"}


def test_examples_differ_in_their_answers_and_follow_the_seed():
    task = make_routing(100, 8)
    examples = choose_examples(task, 4, 1)
    assert len({row.answer for row in examples}) == 4
    assert choose_examples(task, 4, 1) == examples
    assert choose_examples(task, 4, 2) != examples
    assert choose_examples(task, 0, 1) == []
