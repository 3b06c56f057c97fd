"""How the model in training keeps gradients, masters and weights, for weights of any type."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.core.specs import BaseFacts
from luthier.methods import Start, Workload, check_tuning, parse_tuning
from luthier.modeling.load import load_base
from luthier.modeling.protocols import Batch
from luthier.training.loop.gradient_accumulation import apply_gradients, compute_gradients
from luthier.training.model.batches import collate
from luthier.training.model.optimizer import build_optimizer
from luthier.training.model.training_model import JobModel
from luthier.training.output.verification import bare_base, check_artifact
from tests.tiny import BASE_ID, build_tiny_base, build_tiny_rows

ROWS = build_tiny_rows(8)
FULL = {"type": "full"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("bases") / BASE_ID)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def batch(*rows: int) -> Batch:
    return collate(ROWS, np.array(rows), pad_id=2)


def make(base: Path, dtype: torch.dtype = torch.float32, tuning: dict[str, Any] | None = None) -> JobModel:
    method, params = parse_tuning(check_tuning(tuning or FULL))
    facts = BaseFacts.model_validate_json((base / "base.json").read_bytes())
    resolved = method.resolve(params, Workload(facts, num_rows=8, num_tokens=200))
    start = Start(5, BASE_ID, tokenize=lambda _text: [7], examples=[[5, 6, 7]])
    attached = method.attach(load_base(base, dtype=dtype, device="cpu"), resolved, start)
    return JobModel(method, attached, "cpu", batch(0))


def learn(trainee: JobModel, num_steps: int, parts: list[Batch] | None = None) -> list[torch.Tensor]:
    parts = parts or [batch(*range(8))]
    optimizer = build_optimizer(trainee.parameters, learning_rate=1e-3, weight_decay=0.1, device="cpu")
    num_supervised = sum(int(part.supervised_BT.sum()) for part in parts)
    trainee.attached.model.train()
    for _ in range(num_steps):
        scores = compute_gradients(trainee, parts, num_supervised=num_supervised)
        apply_gradients(trainee, optimizer, scores, learning_rate=1e-3, max_grad_norm=1.0)
    trainee.attached.model.eval()
    return [parameter.detach().clone() for parameter in trainee.parameters]


def weights(trainee: JobModel) -> list[torch.Tensor]:
    return [value for _, value in trainee.attached.named_trained_parameters()]


@pytest.mark.parametrize("tuning", [{"type": "lora"}, {"type": "adapter"}])
def test_what_lies_on_a_bf16_base_is_trained_in_float32(base: Path, tuning: dict[str, Any]) -> None:
    trainee = make(base, torch.bfloat16, tuning)
    assert {parameter.dtype for parameter in trainee.parameters} == {torch.float32}


def test_the_parts_of_a_step_are_summed_in_float32_whatever_the_weights_are(base: Path) -> None:
    trainee = make(base, torch.bfloat16)
    single = []
    for row in range(3):
        trainee.clear_gradients()
        trainee.add_gradients(trainee.loss(batch(row)).nll_sum)
        assert {gradient.dtype for gradient in trainee.gradients} == {torch.bfloat16}
        single.append([gradient.clone() for gradient in trainee.gradients])
    trainee.clear_gradients()
    for row in range(3):
        trainee.add_gradients(trainee.loss(batch(row)).nll_sum)
    for (name, parameter), *parts in zip(trainee.named_parameters, *single, strict=True):
        expected = parts[0].float() + parts[1].float() + parts[2].float()
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        if name == "model.embed_tokens.weight":
            # A tied weight gets two gradients a part, and these too are now added in float32.
            assert (parameter.grad - expected).norm() < 2**-8 * expected.norm()
        else:
            assert torch.equal(parameter.grad, expected), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_leaves_no_gradient(base: Path, dtype: torch.dtype) -> None:
    trainee = make(base, dtype)
    learn(trainee, 2, [batch(0, 1), batch(2, 3)])
    assert trainee.gradients == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_step_that_broke_off_are_forgotten(base: Path, dtype: torch.dtype) -> None:
    parts = [batch(0, 1), batch(2, 3)]
    undisturbed = make(base, dtype)
    compute_gradients(undisturbed, parts, num_supervised=20)
    trainee = make(base, dtype)
    trainee.add_gradients(trainee.loss(batch(4, 5)).nll_sum)
    trainee.add_gradients(trainee.loss(batch(6, 7)).nll_sum)
    compute_gradients(trainee, parts, num_supervised=20)
    pairs = zip(trainee.gradients, undisturbed.gradients, strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_the_norm_of_bf16_gradients_is_summed_in_float32(base: Path) -> None:
    trainee = make(base, torch.bfloat16)
    scores = compute_gradients(trainee, [batch(*range(8))], num_supervised=30)
    everything = torch.cat([gradient.double().flatten() for gradient in trainee.gradients])
    assert {gradient.dtype for gradient in trainee.gradients} == {torch.bfloat16}
    assert scores.grad_norm == pytest.approx(everything.norm().item(), rel=1e-5)


def test_weights_with_dropout_are_probed_without_it(base: Path) -> None:
    trainee = make(base, tuning={"type": "lora", "dropout": 0.5})
    # Else the probe would find that logits don't come from the head, and compute all of them in every step.
    assert trainee.reference.head is not None


@pytest.mark.parametrize(
    "tuning", [{"type": "lora"}, {"type": "lora", "use_dora": True}, {"type": "adapter"}]
)
def test_the_bare_base_shares_every_weight_and_gives_the_bases_logits(
    base: Path, tuning: dict[str, Any]
) -> None:
    trainee = make(base, tuning=tuning)
    learn(trainee, 2)
    bare = bare_base(trainee)
    untouched = load_base(base, dtype=torch.float32, device="cpu")
    tokens_BT = batch(1, 2).token_ids_BT
    with torch.no_grad():
        assert torch.equal(bare(input_ids=tokens_BT).logits, untouched(input_ids=tokens_BT).logits)
        assert not torch.equal(trainee.logits(batch(1, 2)), untouched(input_ids=tokens_BT).logits)
    addresses = {value.data_ptr() for value in trainee.attached.causal_lm.parameters()}
    assert {value.data_ptr() for value in bare.parameters()} <= addresses
    assert {name for name, _ in bare.named_parameters()} == {name for name, _ in untouched.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tuning", [FULL, {"type": "lora"}, {"type": "adapter"}])
def test_a_check_leaves_the_trained_model_as_it_was(
    base: Path, tmp_path: Path, tuning: dict[str, Any], dtype: torch.dtype
) -> None:
    trainee = make(base, dtype, tuning)
    learn(trainee, 3)
    with torch.no_grad():
        before = trainee.logits(batch(2, 3))
    trainee.method.save(trainee.attached, tmp_path)
    trainee.attached.model.train()
    check_artifact(trainee, tmp_path, batch(1))
    assert trainee.attached.model.training
    trainee.attached.model.eval()
    with torch.no_grad():
        assert torch.equal(trainee.logits(batch(2, 3)), before)
