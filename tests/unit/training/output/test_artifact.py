"""The log that continues after a resume, and the card: it escapes every value and shows how to load."""

import json
from types import SimpleNamespace
from typing import cast

import pytest
import yaml

from luthier.core.events import Metrics
from luthier.core.specs import RunInputs, TrainingSpec
from luthier.methods import discover
from luthier.training.model.training_model import JobModel
from luthier.training.output.artifact import Origin, TrainingLog, _card, _code
from tests.tiny import make_facts


def test_a_log_continues_from_its_save_point_and_forgets_later_steps(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "tra')
    log = TrainingLog(path, '{"step": 1}\n')
    log.append(step=2, train_loss=0.5)
    assert [json.loads(line)["step"] for line in log.read().splitlines()] == [1, 2]


def test_a_value_stays_inside_its_cell():
    assert _code("a`|b\n# c\u202e") == "`a  b # c `"
    assert _code(["x"]) == '`["x"]`'


@pytest.mark.parametrize(
    ("name", "library", "call"),
    [
        ("lora", "peft", "peft.PeftModel.from_pretrained(base, folder)"),
        ("prefix", "peft", "peft.PeftModel.from_pretrained(base, folder)"),
        ("prompt", "peft", "peft.PeftModel.from_pretrained(base, folder)"),
        ("full", "transformers", "transformers.AutoModelForCausalLM.from_pretrained(folder)"),
        ("adapter", None, "def load_adapter(model, folder):"),
    ],
)
def test_a_card_names_the_library_and_the_call_that_load_its_artifact(name, library, call):
    base = make_facts(id="b", licence="mit")
    inputs = RunInputs(job_id="ftjob-x", model_name="ft:b:o::x", base_path="/x")
    spec = TrainingSpec(base=base, base_id="b", tuning={"type": name}, seed=1)
    job_model = SimpleNamespace(method=discover()[name], attached=SimpleNamespace(num_trained_parameters=3))
    card = _card(Origin(inputs, spec, base), cast(JobModel, job_model), 4, Metrics(train_loss=1.0))
    header = yaml.safe_load(card.split("---")[1])
    assert header == {
        "base_model": "b",
        **({} if library is None else {"library_name": library}),
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["luthier", name],
    }
    assert call in card.split("## Loading")[1]
