"""What full tuning promises beyond what every method does: whole models, masters, frozen parts."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from luthier.core.errors import ArtifactCorruptError, InvalidRequestError, InvalidValueError, SelfCheckError
from luthier.core.shapes import read_shape
from luthier.methods import Attached, Start
from luthier.methods._tuning import check_tuning
from luthier.methods.full import METHOD, FullParams
from luthier.modeling.load import load_base
from luthier.training.loop.gradient_accumulation import compute_gradients
from luthier.training.model.optimizer import build_optimizer
from luthier.training.model.training_model import JobModel
from luthier.training.output.verification import check_artifact
from tests.tiny import BASE_ID
from tests.tiny_methods import Bench, batch, step
from tests.tiny_shapes import SHAPES

ALL = range(8)
FIRST_MLP = {f"model.layers.0.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
INPUT_NORMS = {f"model.layers.{number}.input_layernorm.weight" for number in range(2)}


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_base(folder, dtype=dtype, device="cpu")


def attach(folder: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Attached:
    start = Start(5, BASE_ID, tokenize=lambda _text: [])
    return METHOD.attach(load(folder, dtype), FullParams(**fields), start)


def make(folder: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> JobModel:
    return JobModel(METHOD, attach(folder, dtype, **fields), "cpu", batch(0))


def train(job_model: JobModel, num_steps: int, rate: float = 1e-3) -> list[float]:
    optimizer = build_optimizer(job_model.parameters, learning_rate=rate, weight_decay=0.0, device="cpu")
    job_model.attached.model.train()
    losses = [step(job_model, optimizer, [batch(*ALL)], learning_rate=rate).loss for _ in range(num_steps)]
    job_model.attached.model.eval()
    return losses


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=batch(2, 3).token_ids_BT, use_cache=False).logits


@pytest.mark.parametrize(
    ("freeze", "expected"),
    [
        (["embed_tokens"], {"model.embed_tokens.weight"}),
        (["lm_head"], {"model.embed_tokens.weight"}),
        ("model.embed_tokens", {"model.embed_tokens.weight"}),
        (["layers.0.mlp", "norm"], {"model.norm.weight", *FIRST_MLP}),
        (r".*layers\.\d+\.input_layernorm\.weight", INPUT_NORMS),
    ],
)
def test_freeze_keeps_what_it_names_alone(base: Path, freeze: str | list[str], expected: set[str]) -> None:
    job_model = make(base, freeze=freeze)
    model = job_model.attached.causal_lm
    assert {name for name, value in model.named_parameters() if not value.requires_grad} == expected
    cost = METHOD.cost(FullParams(freeze=freeze), read_shape(base))
    assert job_model.attached.num_trained_parameters == cost.num_parameters
    train(job_model, 2)
    before = dict(load(base).named_parameters())
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]) == (name in expected), name


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        (["nope"], "embed_tokens"),
        ("nope", "embed_tokens"),
        (".*", "nothing to train"),
        (["model"], "nothing"),
    ],
)
def test_freezing_nothing_or_everything_is_refused(base: Path, freeze: str | list[str], message: str) -> None:
    with pytest.raises(InvalidValueError, match=message) as caught:
        attach(base, freeze=freeze)
    assert caught.value.param == "tuning.freeze"


@pytest.mark.parametrize("freeze", ["(a", "", [], 3])
def test_a_freeze_that_can_not_be_meant_is_refused_with_the_request(freeze: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        check_tuning({"type": "full", "freeze": freeze})
    assert caught.value.param == "tuning.freeze"


@pytest.mark.parametrize("shape", SHAPES)
def test_a_result_is_a_folder_that_transformers_loads(bench: Bench, shape: str, tmp_path: Path) -> None:
    base, folder = bench.bases[shape], tmp_path
    job_model = make(base)
    train(job_model, 4)
    names = METHOD.save(job_model.attached, folder)
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= set(names)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    expected = logits(job_model.attached.model)
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(METHOD.load(load(base), folder).model), expected)
    assert not torch.allclose(logits(load(base)), expected, atol=1e-2)
    is_tied = SHAPES[shape].tie_word_embeddings
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == is_tied
    assert ("lm_head.weight" in load_file(folder / "model.safetensors")) != is_tied
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("the sky")["input_ids"] == AutoTokenizer.from_pretrained(base)("the sky")["input_ids"]


def test_a_result_takes_over_what_chat_needs_and_no_path(base: Path, tmp_path: Path) -> None:
    METHOD.save(attach(base), tmp_path)
    for name in ("chat_template.jinja", "generation_config.json", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (base / name).read_bytes()
    assert str(base) not in (tmp_path / "config.json").read_text()
    assert METHOD.recognises(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    assert not METHOD.recognises(tmp_path)


def test_generation_settings_that_the_library_would_not_save_do_no_harm(base: Path, tmp_path: Path) -> None:
    attached = attach(base)
    odd = attached.causal_lm.generation_config
    odd.temperature, odd.do_sample = 0.5, False
    METHOD.save(attached, tmp_path)
    assert attached.causal_lm.generation_config is odd
    name = "generation_config.json"
    assert (tmp_path / name).read_bytes() == (base / name).read_bytes()


def test_the_head_gets_its_gradient_without_all_logits_where_it_is_a_plain_product(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_model = make(base)
    monkeypatch.setattr(torch.nn.functional, "cross_entropy", None)
    assert train(job_model, 1)


def test_what_is_added_up_beside_bf16_weights_is_cleared_with_each_step(base: Path) -> None:
    job_model = make(base, torch.bfloat16)
    assert {parameter.dtype for parameter in job_model.parameters} == {torch.bfloat16}
    train(job_model, 2)
    assert job_model.gradients == []


def test_in_bf16_cutting_a_batch_into_parts_changes_no_more_than_rounding_does(base: Path) -> None:
    job_model = make(base, torch.bfloat16)
    num_supervised = int(batch(*ALL).supervised_BT.sum())
    found = []
    for parts in ([batch(*ALL)], [batch(i) for i in ALL]):
        compute_gradients(job_model, parts, num_supervised=num_supervised)
        found.append(torch.cat([gradient.float().flatten() for gradient in job_model.gradients]))
    assert {gradient.dtype for gradient in job_model.gradients} == {torch.float32}
    assert (found[0] - found[1]).norm() < 0.02 * found[0].norm()


def test_in_bf16_the_result_is_bf16_and_proves_itself(base: Path, tmp_path: Path) -> None:
    job_model = make(base, torch.bfloat16)
    train(job_model, 3)
    METHOD.save(job_model.attached, tmp_path)
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    check_artifact(job_model, tmp_path, batch(1))


def test_a_result_that_learned_nothing_or_differs_is_refused(base: Path, tmp_path: Path) -> None:
    job_model = make(base)
    METHOD.save(job_model.attached, tmp_path)
    with pytest.raises(SelfCheckError, match="nothing was learned"):
        check_artifact(job_model, tmp_path, batch(1))
    train(job_model, 2)
    with pytest.raises(SelfCheckError, match="other logits"):
        check_artifact(job_model, tmp_path, batch(1))
    METHOD.save(job_model.attached, tmp_path)
    check_artifact(job_model, tmp_path, batch(1))


def test_weights_that_are_missing_are_not_made_up(base: Path, tmp_path: Path) -> None:
    METHOD.save(attach(base), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactCorruptError, match="lacks"):
        METHOD.load(load(base), tmp_path)


def test_a_copy_trains_on_its_own(base: Path) -> None:
    attached = attach(base)
    other = copy.deepcopy(attached)
    before = logits(other.model)
    train(JobModel(METHOD, attached, "cpu", batch(0)), 1)
    assert torch.equal(logits(other.model), before)
