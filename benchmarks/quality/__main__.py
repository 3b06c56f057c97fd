"""Quality of every method on three tasks, beside the base and beside hand-set recipes.

    python -m benchmarks.quality [--task e2e] [--method lora] [--recipe auto] [--seed 1] [--write]

Every finished cell is kept in benchmarks/results/quality.json; a second call continues where the first ended.
The text task reads the E2E data set from a folder (--e2e); without it the table says that it was absent.
"""

import argparse
import itertools
import os
import platform
import random
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.quality.e2e import load_e2e
from benchmarks.quality.orders import make_orders
from benchmarks.quality.recipes import AUTO, RECIPES, find_recipe
from benchmarks.quality.results import Cell, Results, Size
from benchmarks.quality.routing import make_routing
from benchmarks.quality.table import METRICS, render, write_into
from benchmarks.quality.task import Prompt, Row, Task, with_examples
from benchmarks.quality.train import Base, DivergedError, train
from benchmarks.results_file import ROOT
from benchmarks.train.workload import find_base
from luthier.methods import discover

SHOTS = {"0-shot": 0, "4-shot": 4}


def parse_arguments() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality")
    models = ["base", *discover()]
    parser.add_argument("--task", action="append", choices=list(METRICS), help="may be given again; all")
    parser.add_argument("--method", action="append", choices=models, help="may be given again; all")
    parser.add_argument(
        "--recipe", action="append", help='"auto", "hand" (all three) or a recipe\'s name; may be given again'
    )
    parser.add_argument("--seed", action="append", type=int, help="may be given again; 1 and 2")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--epochs", type=int, help='what "auto" takes when left out')
    parser.add_argument("--e2e", type=Path, default=ROOT.parent / "shared" / "data" / "e2e")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--answer-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--batch", type=int, default=32, help="questions that are answered at once")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "quality.json")
    parser.add_argument("--keep-answers", type=Path, help="a folder for the answers, one file a cell")
    parser.add_argument("--table-only", action="store_true", help="measure nothing")
    parser.add_argument("--write", action="store_true", help="put the table into docs/methods.md")
    arguments = parser.parse_args()
    known = {AUTO, "hand", *(recipe.name for recipes in RECIPES.values() for recipe in recipes)}
    if unknown := set(arguments.recipe or ()) - known:
        parser.error(f"unknown recipe {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    return arguments


def main() -> None:
    """Measure what is missing, print the table, write it where asked."""
    arguments = parse_arguments()
    # So that what is under way is cleaned up; finished cells are kept already.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    size = Size(arguments.rows, arguments.questions, arguments.epochs)
    results = Results(arguments.out)
    absent: set[str] = set()
    if not arguments.table_only:
        tasks = {name: make_task(name, arguments) for name in arguments.task or METRICS}
        absent = {name for name, task in tasks.items() if task is None}
        for name in sorted(absent):
            print(f"{name}: {arguments.e2e} has no dev.jsonl and test.jsonl; left out", flush=True)
        present = {name: task for name, task in tasks.items() if task is not None}
        measurement = Measurement(arguments, results, size)
        for cell in cells_of(list(present), arguments):
            measurement.measure(present[cell.task], cell)
    table = render(results, size, list(discover()), frozenset(absent))
    print(table)
    if arguments.write:
        write_into(ROOT / "docs" / "methods.md", table)


def make_task(name: str, arguments: argparse.Namespace) -> Task | None:
    """Return a task by its name; None when its data set is absent."""
    if name == "e2e":
        return load_e2e(arguments.e2e, arguments.rows, arguments.questions)
    make = {"routing": make_routing, "orders": make_orders}[name]
    return make(arguments.rows, arguments.questions)


def cells_of(tasks: list[str], arguments: argparse.Namespace) -> Iterator[Cell]:
    """Yield what is asked for, the most informative first: base, "auto", then the recipes seed by seed."""
    models = arguments.method or ["base", *discover()]
    seeds = arguments.seed or [1, 2]
    if "base" in models:
        for task in tasks:
            # Without examples nothing is random.
            yield Cell(task, "base", "0-shot", seeds[0])
            yield from (Cell(task, "base", "4-shot", seed) for seed in seeds)
    methods = [model for model in models if model != "base"]
    asked = arguments.recipe or [AUTO, "hand"]
    if AUTO in asked:
        for seed, task, method in itertools.product(seeds, tasks, methods):
            yield Cell(task, method, AUTO, seed)
    for seed, task, method in itertools.product(seeds, tasks, methods):
        for recipe in RECIPES.get(method, ()):
            if "hand" in asked or recipe.name in asked:
                yield Cell(task, method, recipe.name, seed)


class Measurement:
    """What all cells share.

    Args:
        arguments: the command line's options.
        results: where cells are kept.
        size: of this measurement.
    """

    def __init__(self, arguments: argparse.Namespace, results: Results, size: Size) -> None:
        facts, folder = find_base()
        self._base = Base(facts, folder)
        self._arguments, self._results, self._size = arguments, results, size
        self._machine = {
            "processor": _processor(),
            "num_threads": arguments.threads,
            "base": facts.id,
            "base_digest": facts.digest,
            "answer_dtype": arguments.answer_dtype,
        }

    def measure(self, task: Task, cell: Cell) -> None:
        """Measure one cell and keep it, unless it is kept already."""
        if self._results.find(cell, self._size) is not None:
            return
        begin = time.perf_counter()
        if cell.model == "base":
            examples = choose_examples(task, SHOTS[cell.recipe], cell.seed)
            measured = self._score(task, cell, None, examples)
        else:
            measured = self._tune_and_score(task, cell)
        self._results.store(cell, self._size, {"machine": self._machine, **measured})
        scores = ", ".join(f"{name} {value:.1f}" for name, value in measured.get("scores", {}).items())
        print(
            f"{cell.task} {cell.model} {cell.recipe} seed {cell.seed}: {scores or measured['diverged']} "
            f"({time.perf_counter() - begin:.0f} s)",
            flush=True,
        )

    def _tune_and_score(self, task: Task, cell: Cell) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="luthier-quality-") as scratch:
            try:
                trained = train(
                    Path(scratch) / "run",
                    task,
                    method=cell.model,
                    recipe=find_recipe(cell.model, cell.recipe),
                    seed=cell.seed,
                    num_epochs=self._size.epochs,
                    base=self._base,
                    num_threads=self._arguments.threads,
                )
            except DivergedError as error:
                return {"diverged": str(error)}
            return trained.facts | self._score(task, cell, trained.folder, [])

    def _score(self, task: Task, cell: Cell, artifact: Path | None, examples: list[Row]) -> dict[str, Any]:
        import torch

        from benchmarks.quality.answer import Answerer

        answerer = Answerer(
            self._base.folder,
            artifact,
            dtype=getattr(torch, self._arguments.answer_dtype),
            num_threads=self._arguments.threads,
            num_rows=self._arguments.batch,
        )
        prompts = [with_examples(question.prompt, examples) for question in task.questions]
        begin = time.perf_counter()
        answers = answerer.answer(prompts, max_new_tokens=task.max_new_tokens)
        seconds = time.perf_counter() - begin
        self._keep(cell, prompts, answers)
        scores = task.score(answers, [question.references for question in task.questions])
        return {"scores": scores, "answer_seconds": seconds}

    def _keep(self, cell: Cell, prompts: list[Prompt], answers: list[str]) -> None:
        folder = self._arguments.keep_answers
        if folder is None:
            return
        folder.mkdir(parents=True, exist_ok=True)
        lines = [f"{prompt[-1][1]}\n  {answer!r}\n" for prompt, answer in zip(prompts, answers, strict=True)]
        (folder / f"{cell.task}-{cell.model}-{cell.recipe}-{cell.seed}.txt").write_text("".join(lines))


def choose_examples(task: Task, num_examples: int, seed: int) -> list[Row]:
    """Return training rows to show in the prompt, with different answers as long as there are any."""
    rows = list(task.rows)
    random.Random(seed).shuffle(rows)
    first_of: dict[str, Row] = {}
    for row in rows:
        first_of.setdefault(row.answer, row)
    return list(first_of.values())[:num_examples]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
