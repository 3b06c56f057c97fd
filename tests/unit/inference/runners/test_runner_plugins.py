"""A runner that another package registers serves before the ones that ship with Luthier."""

import sys
from pathlib import Path

import pytest

from luthier.inference.engine.step import BatchExecutor
from luthier.inference.runners import registry
from luthier.inference.runners.reference import ReferenceRunner
from tests.tiny import BASE_ID, build_tiny_base
from tests.unit.inference.artifacts import load_tiny
from tests.unit.inference.sequences import ask, run

# One that is exact for a table of answers that transformers gave when it was loaded.
_SOURCE = '''
"""A runner that answers from a table: the logits that transformers gave, by the tokens so far."""

import torch

from tests.table_runner import LIMITS, TableRunner


class Provider:
    def refusal(self, model):
        return None if model.config.model_type == "llama" else "It is not a Llama."

    def load(self, weights, budget):
        return Runner(weights.model, budget)


class Logits:
    def __init__(self, logits):
        self.logits = logits

    def greedy(self):
        return self.logits.argmax(-1).tolist()

    def draw(self, rows, **_):
        return [None] * len(rows)

    def rows(self, rows):
        return self.logits[list(rows)]


class Runner(TableRunner):
    def __init__(self, model, budget):
        super().__init__(vocabulary_size=model.config.vocab_size, max_sequences=budget.max_sequences)
        self.model, self.table = model, {}

    def look_up(self, tokens):
        if tokens not in self.table:
            with torch.inference_mode():
                self.table[tokens] = self.model(torch.tensor([tokens])).logits[0, -1]
        return self.table[tokens]

    def execute(self, batch, on_launch=None):
        super().execute(batch, on_launch)
        found, size = [], self.limits.block_size
        for chunk in batch.chunks:
            cells = [cell for block in chunk.block_table for cell in self._cells[block]]
            for place in range(chunk.logits_from, len(chunk.token_ids)):
                found.append(self.look_up(tuple(cells[: chunk.first_position + place + 1])))
        return Logits(torch.stack(found)) if found else Logits(torch.empty(0, self.limits.vocabulary_size))
'''


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a package of one file and its entry point."""
    packages = tmp_path / "packages"
    metadata = packages / "table_answers-1.0.dist-info"
    metadata.mkdir(parents=True)
    (packages / "table_answers.py").write_text(_SOURCE)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: table-answers\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[luthier.runners]\ntable = table_answers:Provider\n")
    monkeypatch.syspath_prepend(packages)
    monkeypatch.delitem(sys.modules, "table_answers", raising=False)


@pytest.mark.usefixtures("installed")
def test_a_runner_of_another_package_answers_with_no_other_file_touched(tmp_path):
    folder = build_tiny_base(tmp_path / BASE_ID)
    base = load_tiny(folder)
    assert type(base.executor.runner).__module__ == "table_answers"
    reference = ReferenceRunner(base.executor.runner.model, num_blocks=64, max_sequences=4)
    found = []
    for executor in (base.executor, BatchExecutor(reference)):
        asked = [ask(prompt, 6) for prompt in ([5, 6, 7], list(range(20, 33)))]
        run(executor, *asked)
        found.append([one.token_ids for one in asked])
    assert found[0] == found[1]


@pytest.mark.usefixtures("installed")
def test_reference_is_asked_last(tmp_path):
    names = [name for name, _ in registry.find_providers()]
    assert names[0] == "table" and names[-1] == "reference"


@pytest.mark.usefixtures("installed")
def test_a_runner_that_cannot_be_imported_is_logged_and_the_others_serve(tmp_path, caplog):
    (tmp_path / "packages" / "table_answers.py").write_text("import a_package_that_is_not_installed\n")
    names = [name for name, _ in registry.find_providers()]
    assert "table" not in names and names[-1] == "reference"
    [record] = [record for record in caplog.records if "table" in record.getMessage()]
    assert "a_package_that_is_not_installed" in record.getMessage()
