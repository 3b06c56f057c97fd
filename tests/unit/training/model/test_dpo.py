"""The preference loss against one written from the paper's equation over whole logits."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from luthier.data.prepare.preference_pairs import rows_of_pairs
from luthier.methods import Attached
from luthier.modeling.load import load_base
from luthier.training.loop.gradient_accumulation import compute_pair_gradients
from luthier.training.model.batches import collate
from luthier.training.model.dpo import PairBatch, pair_loss, reference_log_likelihoods
from luthier.training.model.training_model import JobModel, Untuned
from tests.tiny import build_tiny_pairs
from tests.tiny_methods import make_job_model

ROWS = build_tiny_pairs(6)
BETA = 0.3
# One whose output layer is frozen, one whose is trained and tied, one that does not start as the base.
TUNINGS: list[dict[str, Any]] = [
    {"type": "lora", "rank": 4},
    {"type": "full"},
    {"type": "prompt", "num_virtual_tokens": 3},
]


def bare(base: Path) -> JobModel:
    causal_lm = load_base(base, dtype=torch.float32, device="cpu").eval()
    sample = collate(ROWS, np.array([0]), pad_id=2)
    return JobModel(Untuned(), Attached(model=causal_lm, causal_lm=causal_lm), "cpu", sample)


def references(base: Path) -> np.ndarray:
    """Return the bare base's log-likelihood of every row."""
    return reference_log_likelihoods(bare(base), ROWS, max_tokens=200, pad_id=2, should_stop=lambda: False)


def make(base: Path, tuning: dict[str, Any]) -> JobModel:
    job_model = make_job_model(base, tuning, sample=collate(ROWS, np.array([0]), pad_id=2))
    # LoRA starts as the base: moved, its gradients are those of any step.
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in job_model.parameters:
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    job_model.attached.model.eval()
    return job_model


def part(reference_N: np.ndarray, *pairs: int) -> PairBatch:
    rows = rows_of_pairs(np.array(pairs))
    return PairBatch(collate(ROWS, rows, pad_id=2), torch.from_numpy(reference_N[rows]))


def written_out(job_model: JobModel, reference_N: np.ndarray, pairs: list[int]) -> torch.Tensor:
    """Return the mean loss, row by row over whole logits, as the paper's equation 7 says it."""
    losses = []
    for pair in pairs:
        ratios = []
        for row in (2 * pair, 2 * pair + 1):
            tokens, supervised = ROWS.row(row)
            token_ids_BT = torch.from_numpy(tokens.astype(np.int64))[None]
            single = collate(ROWS, np.array([row]), pad_id=2)
            log_p_TV = job_model.logits(single)[0, :-1].log_softmax(-1)
            log_p_T = log_p_TV.gather(1, token_ids_BT[0, 1:, None])[:, 0]
            ratios.append(log_p_T[torch.from_numpy(supervised[1:])].sum() - float(reference_N[row]))
        losses.append(-torch.log(torch.sigmoid(BETA * (ratios[0] - ratios[1]))))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("tuning", TUNINGS, ids=str)
def test_loss_and_gradients_equal_the_paper_s_equation(tuning, base):
    reference_N = references(base)
    job_model = make(base, tuning)
    expected = written_out(job_model, reference_N, [0, 3, 5])
    wanted = torch.autograd.grad(expected, job_model.parameters, allow_unused=True)
    scores = compute_pair_gradients(
        job_model, [part(reference_N, 0, 3, 5)], beta=BETA, num_pairs=3, num_supervised=40
    )
    assert scores.loss == pytest.approx(expected.item(), rel=1e-5)
    assert scores.accuracy is None
    for (name, parameter), gradient in zip(job_model.named_parameters, wanted, strict=True):
        found = parameter.grad
        assert (found is None) == (gradient is None), name
        if found is not None and gradient is not None:
            assert torch.allclose(found, gradient, atol=1e-5, rtol=1e-3), name


def test_the_cut_into_parts_changes_nothing(base):
    reference_N = references(base)
    found = []
    for parts in ([(0, 3, 5, 1)], [(0,), (3, 5), (1,)]):
        job_model = make(base, {"type": "lora", "rank": 4})
        batches = [part(reference_N, *pairs) for pairs in parts]
        scores = compute_pair_gradients(job_model, batches, beta=BETA, num_pairs=4, num_supervised=50)
        found.append((scores, [gradient.clone() for gradient in job_model.gradients]))
    (whole, gradients), (cut, others) = found
    assert cut.loss == pytest.approx(whole.loss, rel=1e-6)
    assert cut.reward_margin == pytest.approx(whole.reward_margin, rel=1e-5)
    assert cut.reward_accuracy == whole.reward_accuracy
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients, others, strict=True))


def test_a_part_with_nothing_to_score_adds_no_gradient(base):
    reference_N = references(base)
    job_model = make(base, {"type": "lora", "rank": 4})
    whole = part(reference_N, 0, 3)
    nothing = replace(whole.batch, supervised_BT=torch.zeros_like(whole.batch.supervised_BT))
    empty = PairBatch(nothing, torch.zeros(4))
    scores = compute_pair_gradients(job_model, [whole], beta=BETA, num_pairs=2, num_supervised=20)
    gradients = [gradient.clone() for gradient in job_model.gradients]
    more = compute_pair_gradients(job_model, [whole, empty], beta=BETA, num_pairs=2, num_supervised=20)
    # Each of its two pairs is as likely as not.
    assert more.loss == pytest.approx(scores.loss + math.log(2), rel=1e-6)
    assert all(map(torch.equal, job_model.gradients, gradients))


@torch.no_grad()
def test_the_model_that_the_job_starts_from_prefers_nothing_to_itself(base):
    reference_N = references(base)
    loss = pair_loss(bare(base), part(reference_N, 0, 1, 2, 3), BETA)
    assert loss.loss_sum.item() / 4 == pytest.approx(math.log(2), abs=1e-5)
    assert float(loss.margins_P.sum()) == pytest.approx(0.0, abs=1e-4)
