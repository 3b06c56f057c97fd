"""The training accelerator is chosen for the models that it knows, and checked against the reference path."""

from pathlib import Path

import pytest
import torch

from luthier.core.errors import SelfCheckError
from luthier.modeling.training_protocols import Batch
from luthier.training.model import agreement
from luthier.training.model.training_model import JobModel
from tests.tiny import BASE_ID, build_tiny_base
from tests.tiny_methods import LLAMA, VARIANTS, Bench, Case, batch, everything, train

LORA = Case(LLAMA, {"type": "lora"})


def test_a_fast_path_with_a_wrong_scale_is_found_though_it_agreed_at_the_start(bench: Bench) -> None:
    # The fast path takes its scale when it is made; the plain one reads PEFT's.
    job_model = bench.job_model(LORA)
    assert job_model.path == "fused"
    job_model.attached.causal_lm.model.layers[0].self_attn.q_proj.scaling["default"] *= 2
    job_model.verify([batch(0)])
    train(job_model, LORA, 8)
    with pytest.raises(SelfCheckError, match="accelerator"):
        job_model.verify([batch(0)])


def test_full_tuning_of_a_llama_with_a_head_of_its_own_takes_the_fast_path(bench: Bench) -> None:
    job_model = bench.job_model(Case("llama-untied", {"type": "full"}))
    assert job_model.path == "fused"
    job_model.add_gradients(job_model.loss(everything()).nll_sum)
    untouched = [name for name, value in job_model.named_parameters if value.grad is None]
    assert untouched == []


@pytest.mark.usefixtures("float32_judges")
@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_a_fast_path_that_only_rounding_parts_from_the_plain_one_is_not_refused(
    bench: Bench, case: Case
) -> None:
    job_model = bench.job_model(case, dtype=torch.bfloat16)
    # What has no fast path in float32 has none here; all others must get theirs by float32's word.
    assert job_model.path == bench.job_model(case).path
    assert _same(job_model, everything()) == (job_model.path == "plain")
    train(job_model, case, 3)
    # The head's check compares one product with itself, which nothing parts.
    job_model.verify([batch(0), everything()])


@pytest.mark.usefixtures("float32_judges")
def test_a_wrong_fast_path_is_refused_by_float32(bench: Bench) -> None:
    job_model = bench.job_model(LORA, dtype=torch.bfloat16)
    train(job_model, LORA, 8)
    job_model.verify([batch(0)])
    # The fast path took its scale when it was made; the plain one reads PEFT's.
    for layer in job_model.attached.causal_lm.model.layers:
        layer.mlp.down_proj.scaling["default"] *= 4
    with pytest.raises(SelfCheckError, match="accelerator"):
        job_model.verify([batch(0)])


def _same(job_model: JobModel, rows: Batch) -> bool:
    path = job_model.reference if job_model.accelerated is None else job_model.accelerated
    with torch.no_grad():
        return torch.equal(path.logits(rows), job_model.reference.logits(rows))


@pytest.fixture
def float32_judges(monkeypatch: pytest.MonkeyPatch) -> None:
    """No two results in bf16 are near enough to each other to do without float32."""
    monkeypatch.setitem(agreement._TOLERANCES, torch.bfloat16, (0.0, 0.0))


def _alike(shared: int, own: list[int], first_supervised: int) -> Batch:
    """Return rows that share their beginning, with ends of their own of different lengths."""
    generator = torch.Generator().manual_seed(shared)
    longest = shared + max(own)
    ids_BT = torch.randint(5, 200, (len(own), longest), generator=generator)
    ids_BT[:, :shared] = ids_BT[:1, :shared]
    supervised_BT = torch.zeros(len(own), longest, dtype=torch.bool)
    for row, length in enumerate(own):
        ids_BT[row, shared + length :] = 2
        supervised_BT[row, shared + first_supervised : shared + length - 1] = True
    return Batch(ids_BT, supervised_BT, sum(own) + shared * len(own))


@pytest.mark.parametrize("kind", ["lora", "prefix", "prompt", "adapter", "full"])
@pytest.mark.parametrize(
    "rows",
    [_alike(20, [9, 4, 7], 2), _alike(180, [5, 3, 40, 9], 1), _alike(40, [6] * 4, 0)],
    ids=["short", "long", "even"],
)
def test_losses_and_gradients_of_rows_that_begin_alike_are_the_plain_paths(
    tmp_path: Path, kind: str, rows: Batch
) -> None:
    assert rows.num_shared > 0
    assert rows.num_needed < rows.token_ids_BT.shape[1]
    long = Bench({LLAMA: build_tiny_base(tmp_path / BASE_ID)})
    job_model = long.job_model(Case(LLAMA, {"type": kind}))
    weights_B = torch.linspace(-1, 2, len(rows.token_ids_BT))

    def score() -> list[torch.Tensor]:
        job_model.clear_gradients()
        loss = job_model.loss(rows)
        job_model.add_gradients(loss.nll_sum)
        likelihoods_B = job_model.row_log_likelihoods(rows)
        job_model.add_gradients((likelihoods_B * weights_B).sum())
        return [loss.nll_sum.detach(), likelihoods_B.detach(), *(one.clone() for one in job_model.gradients)]

    assert job_model.path == "fused"
    found = score()
    job_model.accelerated = None
    for one, other in zip(found, score(), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
