"""How the model in training keeps gradients, masters and weights, for weights of any type."""

from pathlib import Path
from typing import Any

import pytest
import torch

from luthier.modeling.load import load_base
from luthier.modeling.training_protocols import Batch
from luthier.training.loop.gradient_accumulation import compute_gradients
from luthier.training.model.optimizer import build_optimizer
from luthier.training.model.training_model import JobModel
from luthier.training.output.verification import bare_base, check_artifact
from tests.tiny_methods import batch, make_job_model, step

FULL = {"type": "full"}


def make(base: Path, dtype: torch.dtype = torch.float32, tuning: dict[str, Any] | None = None) -> JobModel:
    return make_job_model(base, tuning or FULL, dtype=dtype, sample=batch(0))


def learn(job_model: JobModel, num_steps: int, parts: list[Batch] | None = None) -> list[torch.Tensor]:
    parts = parts or [batch(*range(8))]
    optimizer = build_optimizer(job_model.parameters, learning_rate=1e-3, weight_decay=0.1, device="cpu")
    job_model.attached.model.train()
    for _ in range(num_steps):
        step(job_model, optimizer, parts, learning_rate=1e-3)
    job_model.attached.model.eval()
    return [parameter.detach().clone() for parameter in job_model.parameters]


def weights(job_model: JobModel) -> list[torch.Tensor]:
    return [value for _, value in job_model.attached.named_trained_parameters()]


@pytest.mark.parametrize("tuning", [{"type": "lora"}, {"type": "adapter"}])
def test_adapters_of_a_bf16_base_are_trained_in_float32(base, tuning):
    job_model = make(base, torch.bfloat16, tuning)
    assert {parameter.dtype for parameter in job_model.parameters} == {torch.float32}


def test_the_parts_of_a_step_are_summed_in_float32_whatever_the_weights_are(base):
    job_model = make(base, torch.bfloat16)
    single = []
    for row in range(3):
        job_model.clear_gradients()
        job_model.add_gradients(job_model.loss(batch(row)).nll_sum)
        assert {gradient.dtype for gradient in job_model.gradients} == {torch.bfloat16}
        single.append([gradient.clone() for gradient in job_model.gradients])
    job_model.clear_gradients()
    for row in range(3):
        job_model.add_gradients(job_model.loss(batch(row)).nll_sum)
    for (name, parameter), *parts in zip(job_model.named_parameters, *single, strict=True):
        expected = parts[0].float() + parts[1].float() + parts[2].float()
        assert parameter.grad.dtype == torch.float32
        if name == "model.embed_tokens.weight":
            # A tied weight gets two gradients a part, and these too are now added in float32.
            assert (parameter.grad - expected).norm() < 2**-8 * expected.norm()
        else:
            assert torch.equal(parameter.grad, expected), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_leaves_no_gradient(base, dtype):
    job_model = make(base, dtype)
    learn(job_model, 2, [batch(0, 1), batch(2, 3)])
    assert job_model.gradients == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_a_step_that_broke_off_are_forgotten(base, dtype):
    parts = [batch(0, 1), batch(2, 3)]
    undisturbed = make(base, dtype)
    compute_gradients(undisturbed, parts, num_supervised=20)
    job_model = make(base, dtype)
    job_model.add_gradients(job_model.loss(batch(4, 5)).nll_sum)
    job_model.add_gradients(job_model.loss(batch(6, 7)).nll_sum)
    compute_gradients(job_model, parts, num_supervised=20)
    pairs = zip(job_model.gradients, undisturbed.gradients, strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_the_norm_of_bf16_gradients_is_summed_in_float32(base):
    job_model = make(base, torch.bfloat16)
    scores = compute_gradients(job_model, [batch(*range(8))], num_supervised=30)
    everything = torch.cat([gradient.double().flatten() for gradient in job_model.gradients])
    assert {gradient.dtype for gradient in job_model.gradients} == {torch.bfloat16}
    assert scores.grad_norm == pytest.approx(everything.norm().item(), rel=1e-5)


def test_weights_with_dropout_are_probed_without_it(base):
    job_model = make(base, tuning={"type": "lora", "dropout": 0.5})
    # Else the probe would find that logits don't come from the head, and compute all of them in every step.
    assert job_model.reference.head is not None


@pytest.mark.parametrize(
    "tuning", [{"type": "lora"}, {"type": "lora", "use_dora": True}, {"type": "adapter"}]
)
def test_the_bare_base_shares_every_weight_and_gives_the_bases_logits(base, tuning):
    job_model = make(base, tuning=tuning)
    learn(job_model, 2)
    bare = bare_base(job_model)
    untouched = load_base(base, dtype=torch.float32, device="cpu")
    tokens_BT = batch(1, 2).token_ids_BT
    with torch.no_grad():
        assert torch.equal(bare(input_ids=tokens_BT).logits, untouched(input_ids=tokens_BT).logits)
        assert not torch.equal(job_model.logits(batch(1, 2)), untouched(input_ids=tokens_BT).logits)
    addresses = {value.data_ptr() for value in job_model.attached.causal_lm.parameters()}
    assert {value.data_ptr() for value in bare.parameters()} <= addresses
    assert {name for name, _ in bare.named_parameters()} == {name for name, _ in untouched.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tuning", [FULL, {"type": "lora"}, {"type": "adapter"}])
def test_a_check_leaves_the_trained_model_as_it_was(base, tmp_path, tuning, dtype):
    job_model = make(base, dtype, tuning)
    learn(job_model, 3)
    with torch.no_grad():
        before = job_model.logits(batch(2, 3))
    job_model.method.save(job_model.attached, tmp_path)
    job_model.attached.model.train()
    check_artifact(job_model, tmp_path, batch(1))
    assert job_model.attached.model.training
    job_model.attached.model.eval()
    with torch.no_grad():
        assert torch.equal(job_model.logits(batch(2, 3)), before)
