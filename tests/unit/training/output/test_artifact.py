"""The log that continues after a resume, and the card: it escapes every value and shows how to load."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml

from luthier.core.events import Metrics
from luthier.core.specs import BaseFacts, RunInputs, TrainingSpec
from luthier.methods import discover
from luthier.training.model.training_model import JobModel
from luthier.training.output.artifact import Origin, TrainingLog, _card, _code


def test_a_log_goes_on_from_its_save_point_and_forgets_steps_that_will_be_done_again(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "tra')
    log = TrainingLog(path, '{"step": 1}\n')
    log.append(step=2, train_loss=0.5)
    assert [json.loads(line)["step"] for line in log.read().splitlines()] == [1, 2]


def test_a_value_stays_inside_its_cell() -> None:
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
def test_a_card_names_the_library_and_the_call_that_load_its_artifact(
    name: str, library: str | None, call: str
) -> None:
    facts: dict[str, Any] = {"source": "path:/x", "licence": "mit", "digest": "sha256:1", "hidden_size": 8}
    base = BaseFacts(
        id="b", tokenizer_digest="sha256:2", context_length=9, num_parameters=9, num_layers=1, **facts
    )
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
