"""Attention of short rows by pairs of bfloat16: what plain operators in float32 give, both ways."""

from typing import Any

import pytest
import torch

from luthier_cpu.training import attention as fused_attention
from luthier_cpu.training import pair_attention
from luthier_cpu.training.attention import Attention, Heads
from luthier_cpu.training.pair_attention import attend, attend_backward, can_attend

pytestmark = pytest.mark.skipif(
    not can_attend(torch.zeros(1, 1, 32, dtype=torch.bfloat16)),
    reason="the processor has no products of bfloat16 pairs, or has a matrix unit",
)

Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def _make(num_pairs: int, groups: int, num_tokens: int, start: int, size: int) -> Tensors:
    """Return queries, keys, values and the gradient of the result."""
    generator = torch.Generator().manual_seed(num_tokens)

    def random(num_rows: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(num_pairs, num_rows, size, generator=generator) * scale).bfloat16()

    num_queries, num_keys = groups * num_tokens, start + num_tokens
    return random(num_queries, size**-0.5), random(num_keys), random(num_keys), random(num_queries)


def _plainly(tensors: Tensors, num_tokens: int, start: int) -> list[torch.Tensor]:
    query, key, value = (one.float().requires_grad_() for one in tensors[:3])
    seen_Q1 = torch.arange(query.shape[1])[:, None] % num_tokens + start
    is_hidden_QS = torch.arange(key.shape[1])[None] > seen_Q1
    scores = torch.bmm(query, key.transpose(1, 2)).masked_fill(is_hidden_QS, float("-inf"))
    attended = torch.bmm(torch.softmax(scores, dim=-1), value)
    gradients = torch.autograd.grad(attended, (query, key, value), tensors[3].float())
    return [attended.detach(), *gradients]


@pytest.mark.parametrize(
    ("num_pairs", "groups", "num_tokens", "start", "size"),
    [
        (6, 3, 70, 30, 64),
        (3, 3, 31, 0, 64),
        (2, 2, 5, 3, 96),
        (1, 1, 3, 0, 128),
        (2, 1, 1, 7, 32),
        (4, 3, 160, 200, 64),
        (2, 4, 64, 0, 64),
        (5, 1, 65, 127, 32),
    ],
)
@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("num_threads", [1, 3], indirect=True)
def test_results_and_gradients_are_those_of_plain_operators(
    num_pairs: int, groups: int, num_tokens: int, start: int, size: int
) -> None:
    tensors = _make(num_pairs, groups, num_tokens, start, size)
    expected = _plainly(tensors, num_tokens, start)
    attended, weights = attend(*tensors[:3], num_tokens, start)
    found = [attended, *attend_backward(tensors[3], *tensors[:3], weights, num_tokens, start)]
    for other, own in zip(expected, found, strict=True):
        gap = (own.float() - other).norm()
        # A rounding to bfloat16 is 2^-9 of a number, and there are three one after the other.
        assert gap <= 1e-2 * other.norm() + 1e-3
    assert bool((weights[:, :, start + num_tokens :] == 0).all())


def test_a_number_that_is_none_stays_visible() -> None:
    query, key, value, gradient = _make(1, 1, 9, 0, 32)
    value[0, 4, 3] = float("nan")
    attended, weights = attend(query, key, value, 9, 0)
    assert bool(attended[0, 4:, 3].isnan().all())
    to_query, _, _ = attend_backward(gradient, query, key, value, weights, 9, 0)
    assert bool(to_query[0, 4:].isnan().all())


def test_what_does_not_fit_is_refused() -> None:
    query, key, value, gradient = _make(2, 3, 5, 2, 32)
    _, weights = attend(query, key, value, 5, 2)
    for bad in (
        (query.float(), key, value, 5, 2),
        (query, key[:, 1:], value, 5, 2),
        (query, key, value[:, 1:], 5, 2),
        (query, key, value.half(), 5, 2),
        (query, key, value, 4, 3),
        (query, key, value, 0, 7),
        (query, key, value, 15, -8),
        (query.transpose(0, 1).contiguous().transpose(0, 1), key, value, 5, 2),
        (query[:, :, :20], key[:, :, :20], value[:, :, :20], 5, 2),
    ):
        with pytest.raises(ValueError, match="by pairs takes"):
            attend(*bad)
    for wrong in (weights[:, :, :7], weights.float(), weights[:1]):
        with pytest.raises(ValueError, match="by pairs takes"):
            attend_backward(gradient, query, key, value, wrong, 5, 2)
    with pytest.raises(ValueError, match="by pairs takes"):
        attend_backward(gradient[:, 1:], query, key, value, weights, 5, 2)


def test_it_does_not_run_where_it_comes_out_wrong(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    right = pair_attention.attend

    def double(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        attended, weights = right(*arguments)
        return attended * 2, weights

    monkeypatch.setattr(pair_attention, "attend", double)
    pair_attention._is_right.cache_clear()
    try:
        assert not can_attend(torch.zeros(1, 1, 32, dtype=torch.bfloat16))
        assert "off by" in caplog.text
    finally:
        monkeypatch.undo()
        pair_attention._is_right.cache_clear()


def test_any_number_of_threads_and_any_work_memory_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = _make(5, 3, 23, 10, 96)

    def run(num_threads: int) -> list[torch.Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        # Work memory is full of what is no number.
        held = torch.full((1 << 22,), float("nan"))
        monkeypatch.setattr(pair_attention, "scratch", lambda num_bytes: _begin_of(held, num_bytes))
        try:
            attended, weights = attend(*tensors[:3], 23, 10)
            return [attended, *attend_backward(tensors[3], *tensors[:3], weights, 23, 10)]
        finally:
            torch.set_num_threads(before)

    first = run(1)
    for num_threads in (2, 3, 7):
        for one, other in zip(first, run(num_threads), strict=True):
            assert torch.equal(one, other)


def _begin_of(held: torch.Tensor, num_bytes: int) -> int:
    assert held.nbytes >= num_bytes + 4096
    return -(-held.data_ptr() // 4096) * 4096


@pytest.mark.parametrize("num_shared", [0, 11])
def test_a_step_attends_by_pairs_as_by_batched_products(
    num_shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_rows, num_tokens, size = 3, 40, 32
    generator = torch.Generator().manual_seed(1)
    num_own = num_shared + num_rows * (num_tokens - num_shared)
    qkv = torch.randn(num_own, 5 * size, generator=generator).bfloat16()
    angles = torch.randn(num_tokens, size // 2, generator=generator)
    heads = Heads(3, 1, size, angles.cos(), angles.sin(), 3 * size, num_shared)
    calls: list[int] = []

    def count(*arguments: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(1)
        return attend(*arguments)  # type: ignore[arg-type]

    # The first time that it is asked this attends itself, to try it.
    assert can_attend(qkv[None, :, :size])
    monkeypatch.setattr(pair_attention, "attend", count)

    def run() -> list[torch.Tensor]:
        leaf = qkv.clone().requires_grad_()
        out = Attention.apply(leaf, None, None, heads)
        out.float().pow(2).sum().backward()
        assert leaf.grad is not None
        return [out.detach(), leaf.grad]

    found = run()
    assert len(calls) == (2 if num_shared else 1)
    monkeypatch.setattr(fused_attention, "_goes_by_pairs", lambda *_: False)
    for own, other in zip(found, run(), strict=True):
        assert float((own.float() - other.float()).norm()) <= 5e-3 * float(other.float().norm())
