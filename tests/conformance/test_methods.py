"""What every method promises, held for each that is discovered."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

from luthier.core.errors import InvalidValueError, SelfCheckError
from luthier.core.specs import BaseFacts
from luthier.methods import (
    Attached,
    Method,
    MethodParams,
    Start,
    Workload,
    check_tuning,
    discover,
    parse_tuning,
)
from luthier.modeling.load import load_base
from luthier.training.batches import Batch, collate
from luthier.training.optimizer import build_optimizer
from luthier.training.selfcheck import check_artifact
from luthier.training.step import StepScores, apply_gradients, compute_gradients
from luthier.training.trainee import Trainee
from tests.tiny import BASE_ID, build_tiny_base, build_tiny_rows

METHODS = sorted(discover())
LORA_VARIANTS: list[dict[str, Any]] = [
    {},
    {"target_modules": "attention"},
    {"target_modules": "mlp", "use_rslora": True},
    {"use_dora": True},
]
ROWS = build_tiny_rows(8)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("bases") / BASE_ID)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def resolve(base: Path, tuning: dict[str, Any]) -> tuple[Method, MethodParams]:
    method, params = parse_tuning(check_tuning(tuning))
    facts = BaseFacts.model_validate_json((base / "base.json").read_bytes())
    return method, method.resolve(params, Workload(facts, num_rows=100, num_tokens=4000))


def load(base: Path) -> PreTrainedModel:
    return load_base(base, dtype=torch.float32, device="cpu")


def attach(base: Path, tuning: dict[str, Any]) -> tuple[Method, Attached]:
    method, params = resolve(base, tuning)
    return method, method.attach(load(base), params, Start(5, BASE_ID, lambda _text: [7], [[5, 6, 7, 8]]))


def batch(*rows: int) -> Batch:
    return collate(ROWS, np.array(rows), pad_id=2)


def step(trainee: Trainee, optimizer: torch.optim.Optimizer, parts: list[Batch]) -> StepScores:
    num_supervised = sum(int(part.supervised_BT.sum()) for part in parts)
    scores = compute_gradients(trainee, parts, num_supervised=num_supervised)
    apply_gradients(trainee, optimizer, scores, learning_rate=1e-2, max_grad_norm=1.0)
    return scores


def train(trainee: Trainee, num_steps: int) -> list[float]:
    optimizer = build_optimizer(trainee.parameters, learning_rate=1e-2, weight_decay=0.0, device="cpu")
    trainee.attached.model.train()
    losses = [step(trainee, optimizer, [batch(*range(8))]).loss for _ in range(num_steps)]
    trainee.attached.model.eval()
    return losses


@pytest.mark.parametrize("name", METHODS)
def test_the_start_equals_the_base_where_it_is_promised(base: Path, name: str) -> None:
    method, attached = attach(base, {"type": name})
    tokens = batch(0, 1).token_ids_BT
    with torch.no_grad():
        expected = load(base)(input_ids=tokens).logits
        found = attached.model(input_ids=tokens).logits
    assert torch.equal(found, expected) == method.starts_as_base


@pytest.mark.parametrize("name", METHODS)
def test_the_start_depends_on_the_seed_alone(base: Path, name: str) -> None:
    method, params = resolve(base, {"type": name})
    starts = []
    for seed in (1, 1):
        torch.manual_seed(len(starts))
        attached = method.attach(load(base), params, Start(seed, BASE_ID, lambda _text: [7], [[5, 6, 7, 8]]))
        starts.append(torch.cat([p.detach().flatten() for _, p in attached.named_trained_parameters()]))
    assert torch.equal(starts[0], starts[1])


@pytest.mark.parametrize("name", METHODS)
def test_training_lowers_the_loss_and_leaves_the_base_as_it_was(base: Path, name: str) -> None:
    method, attached = attach(base, {"type": name})
    before = {key: value.clone() for key, value in load(base).state_dict().items()}
    trained = {key for key, _ in attached.named_trained_parameters()}
    losses = train(Trainee(method, attached, "cpu", batch(0)), 12)
    assert losses[-1] < losses[0]
    for key, value in attached.model.state_dict().items():
        plain = key.removeprefix("base_model.model.").replace(".base_layer", "")
        if key not in trained and plain in before:
            assert torch.equal(value, before[plain]), key


@pytest.mark.parametrize("name", METHODS)
def test_the_number_of_parameters_equals_the_formula(base: Path, name: str) -> None:
    variants = LORA_VARIANTS if name == "lora" else [{}]
    for variant in variants:
        method, params = resolve(base, {"type": name, **variant})
        expected = method.count_parameters(load(base), params)
        attached = method.attach(load(base), params, Start(1, BASE_ID, lambda _text: [7], [[5, 6, 7, 8]]))
        assert attached.num_trained_parameters == expected


def test_lora_of_rank_8_on_all_linear_layers_of_the_small_base_is_2_442_240(base: Path) -> None:
    """The figure of the table of methods, from the shapes of SmolLM2-135M."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=64,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    method, params = resolve(base, {"rank": 8})
    assert method.count_parameters(model, params) == 2_442_240


@pytest.mark.parametrize("variant", LORA_VARIANTS)
def test_what_is_saved_gives_the_same_logits_in_plain_peft(
    base: Path, tmp_path: Path, variant: dict[str, Any]
) -> None:
    method, attached = attach(base, variant)
    train(Trainee(method, attached, "cpu", batch(0)), 3)
    names = method.save(attached, tmp_path)
    assert sorted(names) == ["adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == BASE_ID
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path)).eval()
    tokens = batch(2, 3).token_ids_BT
    with torch.no_grad():
        expected = attached.model(input_ids=tokens).logits
        assert torch.allclose(loaded(input_ids=tokens).logits, expected, atol=1e-5)
        assert not torch.allclose(load(base)(input_ids=tokens).logits, expected, atol=1e-2)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_saved_loads_again_by_the_method_itself(base: Path, tmp_path: Path, name: str) -> None:
    method, attached = attach(base, {"type": name})
    trainee = Trainee(method, attached, "cpu", batch(0))
    train(trainee, 3)
    method.save(attached, tmp_path)
    check_artifact(trainee, tmp_path, batch(1))
    again = method.load(load(base), tmp_path)
    assert again.num_trained_parameters == 0
    tokens = batch(2).token_ids_BT
    with torch.no_grad():
        expected = attached.model(input_ids=tokens).logits
        assert torch.allclose(again.model(input_ids=tokens).logits, expected, atol=1e-5)


@pytest.mark.parametrize("variant", LORA_VARIANTS)
def test_what_was_trained_by_shortcuts_is_proved_against_the_whole_model(
    base: Path, variant: dict[str, Any]
) -> None:
    method, attached = attach(base, variant)
    trainee = Trainee(method, attached, "cpu", batch(0))
    train(trainee, 3)
    trainee.prove_shortcuts([batch(0), batch(*range(8))])


def test_a_fast_path_with_a_wrong_scale_is_found_though_it_agreed_at_the_start(base: Path) -> None:
    method, attached = attach(base, {})
    # The fast path takes its scale when it is made; the plain one reads PEFT's.
    trainee = Trainee(method, attached, "cpu", batch(0))
    assert trainee.path == "fused"
    attached.causal_lm.model.layers[0].self_attn.q_proj.scaling["default"] *= 2
    trainee.prove_shortcuts([batch(0)])
    train(trainee, 3)
    with pytest.raises(SelfCheckError, match="fast path"):
        trainee.prove_shortcuts([batch(0)])


def test_weights_that_are_no_numbers_are_refused_even_where_no_sample_meets_them(
    base: Path, tmp_path: Path
) -> None:
    method, attached = attach(base, {})
    trainee = Trainee(method, attached, "cpu", batch(0))
    train(trainee, 1)
    method.save(attached, tmp_path)
    with torch.no_grad():
        trainee.parameters[0][0, 0] = float("inf")
    with pytest.raises(SelfCheckError, match="weights are not all finite"):
        check_artifact(trainee, tmp_path, batch(1))


@pytest.mark.parametrize("name", METHODS)
def test_saving_twice_gives_equal_bytes(base: Path, tmp_path: Path, name: str) -> None:
    method, attached = attach(base, {"type": name})
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        names = method.save(attached, folder)
    assert all((folders[0] / n).read_bytes() == (folders[1] / n).read_bytes() for n in names)


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"use_rslora": True, "target_modules": "mlp"}])
def test_one_step_equals_plain_peft_and_torch(base: Path, variant: dict[str, Any]) -> None:
    method, attached = attach(base, variant)
    reference = copy.deepcopy(attached.model).train()
    rows = batch(*range(8))
    labels = rows.token_ids_BT.masked_fill(~rows.supervised_BT, -100)[:, 1:]
    logits = reference(input_ids=rows.token_ids_BT).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.reshape(-1))
    loss.backward()
    parameters = [p for p in reference.parameters() if p.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1, foreach=False).step()

    trainee = Trainee(method, attached, "cpu", batch(0))
    attached.model.train()
    optimizer = build_optimizer(trainee.parameters, learning_rate=1e-2, weight_decay=0.1, device="cpu")
    # In three parts: cutting the batch must not show.
    scores = step(trainee, optimizer, [batch(0, 1, 2), batch(3, 4, 5), batch(6, 7)])
    assert scores.loss == pytest.approx(loss.item(), rel=1e-5)
    assert scores.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    for found, expected in zip(trainee.parameters, parameters, strict=True):
        # Adam's first step is rate * sign: gradients near zero may differ by their rounding.
        gap = (found.detach() - expected.detach()).abs()
        assert gap.mean() < 1e-5
        assert (gap > 1e-4).float().mean() < 0.01


@pytest.mark.parametrize("name", METHODS)
def test_cutting_a_batch_into_parts_changes_neither_loss_nor_gradient(base: Path, name: str) -> None:
    method, attached = attach(base, {"type": name})
    trainee = Trainee(method, attached, "cpu", batch(0))
    num_supervised = int(batch(*range(8)).supervised_BT.sum())
    results = []
    for parts in ([batch(*range(8))], [batch(i) for i in range(8)]):
        for parameter in trainee.parameters:
            parameter.grad = None
        scores = compute_gradients(trainee, parts, num_supervised=num_supervised)
        gradient = torch.cat([p.grad.flatten() for p in trainee.parameters if p.grad is not None])
        results.append((scores, gradient))
    (whole, gradient), (cut, other) = results
    assert cut.loss == pytest.approx(whole.loss, rel=1e-5)
    assert cut.accuracy == whole.accuracy
    assert torch.allclose(other, gradient, atol=1e-6)


def test_a_rank_that_a_layer_cannot_hold_is_refused(base: Path) -> None:
    with pytest.raises(InvalidValueError, match="32") as caught:
        attach(base, {"rank": 33})
    assert caught.value.param == "tuning.rank"


@pytest.mark.parametrize("target_modules", [["nope"], "nope", ["lm_head"], ["embed_tokens"]])
def test_layers_that_are_not_there_are_refused_with_those_that_are(
    base: Path, target_modules: str | list[str]
) -> None:
    with pytest.raises(InvalidValueError, match="q_proj") as caught:
        attach(base, {"target_modules": target_modules})
    assert caught.value.param == "tuning.target_modules"
