"""What is saved: it loads again with the same logits, by the method and by the library that has it."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from luthier.methods import Method, discover, method_of_artifact
from luthier.training.output.verification import check_artifact
from tests.tiny_methods import CASES, LLAMA, METHODS, VARIANTS, Bench, Case, batch


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_saved_gives_the_same_logits_loaded_again_and_in_the_library_that_it_names(
    bench: Bench, tmp_path: Path, case: Case
) -> None:
    job_model = bench.trained(case, 2)
    method, attached = job_model.method, job_model.attached
    names = method.save(attached, tmp_path)
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())
    assert method_of_artifact(tmp_path) is method
    assert [name for name in METHODS if discover()[name].recognises(tmp_path)] == [method.name]
    check_artifact(job_model, tmp_path, batch(1))
    again = method.load(bench.load(case.shape), tmp_path)
    assert again.num_trained_parameters == 0
    tokens = batch(2, 3).token_ids_BT
    with torch.no_grad():
        expected = method.logits(attached, tokens)
        assert torch.allclose(method.logits(again, tokens), expected, atol=1e-5)
        assert torch.allclose(
            method.hidden_states(again, tokens), method.hidden_states(attached, tokens), atol=1e-5
        )
        assert not torch.allclose(bench.load(case.shape)(input_ids=tokens).logits, expected, atol=1e-4)
        if method.library_name is not None:
            # A library that returns results for virtual tokens returns them first.
            found = load_by_library(method, bench, tmp_path, case)(input_ids=tokens).logits
            assert torch.allclose(found[:, -tokens.shape[1] :], expected, atol=1e-5)


def load_by_library(method: Method, bench: Bench, folder: Path, case: Case) -> torch.nn.Module:
    if method.library_name == "transformers":
        return AutoModelForCausalLM.from_pretrained(folder).eval()
    assert method.library_name == "peft"
    base = AutoModelForCausalLM.from_pretrained(bench.bases[case.shape])
    return PeftModel.from_pretrained(base, str(folder)).eval()


@pytest.mark.parametrize("name", METHODS)
def test_an_artifact_answers_alike_on_a_bf16_base(bench: Bench, tmp_path: Path, name: str) -> None:
    case = Case(LLAMA, {"type": name})
    job_model = bench.job_model(case, dtype=torch.bfloat16)
    job_model.method.save(job_model.attached, tmp_path)
    again = job_model.method.load(bench.load(case.shape, torch.bfloat16), tmp_path)
    tokens = batch(2).token_ids_BT
    with torch.no_grad():
        expected = job_model.method.logits(job_model.attached, tokens)
        assert expected.dtype == torch.bfloat16
        assert torch.equal(job_model.method.logits(again, tokens), expected)


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_equal_weights_give_equal_bytes_that_name_the_base_by_id_and_no_path_or_text(
    bench: Bench, tmp_path: Path, case: Case
) -> None:
    method, attached = bench.attach(case)
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        names = method.save(attached, folder)
    assert all((folders[0] / n).read_bytes() == (folders[1] / n).read_bytes() for n in names)
    written = [path for path in folders[0].glob("*config.json") if path.name != "tokenizer_config.json"]
    for path in written:
        text = path.read_text()
        assert str(bench.bases[case.shape].parent) not in text
        assert case.tuning.get("init_text", "colour of") not in text
    if not method.is_whole_model:
        (path,) = written
        assert json.loads(path.read_text())["base_model_name_or_path"] == case.base_id
