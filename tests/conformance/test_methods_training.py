"""What training does with every method: it learns, it touches nothing else, and parts change nothing."""

import pytest
import torch

from luthier.training.loop.gradient_accumulation import compute_gradients
from luthier.training.model.optimizer import build_optimizer
from luthier.training.model.training_model import JobModel
from tests.tiny_methods import (
    CASES,
    DEFAULTS,
    LLAMA,
    METHODS,
    VARIANTS,
    Bench,
    Case,
    batch,
    digest,
    everything,
    step,
    train,
)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_lowers_the_loss_and_changes_no_byte_of_the_base(bench: Bench, case: Case) -> None:
    method, params = case.settle()
    causal_lm = bench.load(case.shape)
    base = [*causal_lm.parameters(), *causal_lm.buffers()]
    attached = method.attach(causal_lm, params, bench.start(case))
    trained = [parameter for _, parameter in attached.named_trained_parameters()]
    trained_ids = {id(parameter) for parameter in trained}
    frozen = [tensor for tensor in base if id(tensor) not in trained_ids]
    before = digest(frozen)
    starts = [parameter.detach().clone() for parameter in trained]
    losses = train(JobModel(method, attached, "cpu", batch(0)), case, 6)
    assert losses[-1] < losses[0] - 0.02
    assert digest(frozen) == before
    assert bench.is_untouched(case.shape)
    assert all(parameter.grad is None for parameter in frozen)
    assert method.is_whole_model or len(frozen) == len(base)
    moved = [not torch.equal(now, start) for now, start in zip(trained, starts, strict=True)]
    # A key's bias shifts all of a query's scores alike: it has no gradient but rounding.
    assert sum(moved) >= 0.9 * len(moved)


@pytest.mark.parametrize("name", METHODS)
def test_updates_too_small_for_bf16_add_up_on_a_bf16_base(bench: Bench, name: str) -> None:
    job_model = bench.job_model(Case(LLAMA, {"type": name}), dtype=torch.bfloat16)
    starts = [parameter.detach().float().clone() for parameter in job_model.parameters]
    # Near 0.15 neighbours in bf16 differ by 2^-10: one step of 2e-5 is lost there, forty are not.
    rate = 2e-5
    optimizer = build_optimizer(job_model.parameters, learning_rate=rate, weight_decay=0.0, device="cpu")
    job_model.attached.model.train()
    for _ in range(40):
        step(job_model, optimizer, [batch(0, 1)], learning_rate=rate)
    ends = [parameter.detach().float() for parameter in job_model.parameters]
    start, end = (torch.cat([value.flatten() for value in values]) for values in (starts, ends))
    is_large = start.abs() > 0.125
    assert is_large.any()
    assert (start != end)[is_large].float().mean() > 0.2


@pytest.mark.parametrize("case", DEFAULTS, ids=str)
def test_cutting_a_batch_into_parts_changes_neither_loss_nor_gradient(bench: Bench, case: Case) -> None:
    job_model = bench.job_model(case)
    num_supervised = int(everything().supervised_BT.sum())
    results = []
    for parts in ([everything()], [batch(i) for i in range(8)]):
        scores = compute_gradients(job_model, parts, num_supervised=num_supervised)
        gradient = torch.cat([gradient.flatten() for gradient in job_model.gradients])
        results.append((scores, gradient))
    (whole, gradient), (cut, other) = results
    assert cut.loss == pytest.approx(whole.loss, rel=1e-5)
    assert cut.accuracy == whole.accuracy
    assert (other - gradient).norm() < 1e-4 * gradient.norm()


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_what_was_trained_by_shortcuts_is_proved_against_the_whole_model(bench: Bench, case: Case) -> None:
    job_model = bench.trained(case)
    job_model.verify([batch(0), everything()])


@pytest.mark.parametrize("case", VARIANTS, ids=str)
def test_the_path_that_runs_gives_the_plain_paths_gradients(bench: Bench, case: Case) -> None:
    """On the plain path this holds the loss alone, which skips positions and full logits."""
    job_model = bench.trained(case)
    rows = everything()
    num_supervised = int(rows.supervised_BT.sum())
    scores = compute_gradients(job_model, [rows], num_supervised=num_supervised)
    found = torch.cat([gradient.flatten() for gradient in job_model.gradients])
    job_model.clear_gradients()
    targets = rows.token_ids_BT.masked_fill(~rows.supervised_BT, -100)[:, 1:]
    logits = job_model.method.logits(job_model.attached, rows.token_ids_BT)[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    expected = torch.cat([gradient.flatten() for gradient in job_model.gradients])
    assert scores.loss == pytest.approx(loss.item(), rel=1e-5)
    assert (found - expected).norm() < 1e-4 * expected.norm()
