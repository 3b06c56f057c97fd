"""Compiled kernels give what torch's operators give, in float32 and in bfloat16, and hide no NaN."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from luthier_cpu.codegen import kernels
from luthier_cpu.codegen import openmp as _threads
from tests.luthier_cpu import reference_kernels

NUM_ROWS, NUM_TOKENS, NUM_KV_HEADS, GROUPS, HEAD_SIZE = 3, 7, 2, 3, 8
N = NUM_ROWS * NUM_TOKENS
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def draw(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * scale).to(dtype)


def flat(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def meant(tensors: list[torch.Tensor], num_columns: int | None) -> list[torch.Tensor]:
    """Leave out the columns of wide buffers that nothing has written yet."""
    return [t if num_columns is None or t.dim() < 2 else t[..., :num_columns] for t in tensors]


def turning() -> list[torch.Tensor]:
    angles = torch.arange(NUM_TOKENS)[:, None] / 10 ** torch.arange(HEAD_SIZE // 2)
    return [angles.cos(), angles.sin()]


def split(ops: Any, dtype: torch.dtype) -> Any:
    qkv = draw(N, (GROUPS + 2) * NUM_KV_HEADS * HEAD_SIZE, dtype=dtype)
    return ops.split_heads(qkv, *turning(), scale=0.5, num_kv_heads=NUM_KV_HEADS, start=0)


def split_backward(ops: Any, dtype: torch.dtype) -> torch.Tensor:
    pairs = NUM_ROWS * NUM_KV_HEADS
    query = draw(pairs, GROUPS * NUM_TOKENS, HEAD_SIZE, dtype=dtype)
    key, value = (draw(pairs, 2 + NUM_TOKENS, HEAD_SIZE, dtype=dtype) for _ in range(2))
    out = torch.empty(N, (GROUPS + 2) * NUM_KV_HEADS * HEAD_SIZE, dtype=dtype)
    ops.split_heads_backward(
        query, key, value, *turning(), scale=0.5, num_kv_heads=NUM_KV_HEADS, start=2, out_NE=out
    )
    return out


def scores(dtype: torch.dtype) -> torch.Tensor:
    return draw(NUM_ROWS * NUM_KV_HEADS, GROUPS * NUM_TOKENS, 2 + NUM_TOKENS, dtype=dtype, scale=3.0)


CASES: dict[str, tuple[Callable[[Any, torch.dtype], Any], int | None]] = {
    "rms_norm": (
        lambda ops, dtype: ops.rms_norm(draw(N, 48, dtype=dtype), draw(48, dtype=dtype), 1e-5, 64),
        48,
    ),
    "rms_norm_backward": (
        lambda ops, dtype: ops.rms_norm_backward(
            draw(N, 64, dtype=dtype),
            draw(N, 48, dtype=dtype),
            draw(48, dtype=dtype),
            draw(N, dtype=torch.float32).abs(),
        ),
        None,
    ),
    "gated_silu": (lambda ops, dtype: ops.gated_silu(draw(N, 96, dtype=dtype, scale=20.0), 64), 48),
    "gated_silu_backward": (
        lambda ops, dtype: ops.gated_silu_backward(
            draw(N, 96, dtype=dtype, scale=20.0), draw(N, 64, dtype=dtype)
        ),
        None,
    ),
    "split_heads": (split, None),
    "split_heads_backward": (split_backward, None),
    "causal_softmax": (lambda ops, dtype: ops.causal_softmax_(scores(dtype), NUM_TOKENS, 2), None),
    "causal_softmax_backward": (
        lambda ops, dtype: ops.causal_softmax_backward_(
            scores(dtype), ops.causal_softmax_(scores(dtype), NUM_TOKENS, 2), NUM_TOKENS, 2
        ),
        None,
    ),
    "softmax_loss": (
        lambda ops, dtype: ops.softmax_loss_(
            draw(N, 300, dtype=dtype, scale=4.0), torch.arange(N) * 13, keeps_gradient=True
        ),
        None,
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_a_compiled_kernel_equals_the_plain_operators(name: str, dtype: torch.dtype) -> None:
    run, num_columns = CASES[name]
    found, expected = (meant(flat(run(ops, dtype)), num_columns) for ops in (kernels, reference_kernels))
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    for one, other in zip(found, expected, strict=True):
        gap = (one.float() - other.float()).abs().max()
        assert gap <= TOLERANCES[dtype] * max(1.0, float(other.float().abs().max()))


def inside(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a copy between NaN, and the whole memory that it is in."""
    around = torch.full((tensor.numel() + 128,), float("nan"), dtype=tensor.dtype)
    middle = around[64:-64].view(tensor.shape)
    middle.copy_(tensor)
    return middle, around


def assert_untouched(around: torch.Tensor) -> None:
    assert around[:64].isnan().all()
    assert around[-64:].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_keys", [1, 9, 15, 16, 17, 33, 50, 96])
def test_rows_of_scores_of_any_length_become_weights_and_nothing_else_is_written(
    num_keys: int, dtype: torch.dtype
) -> None:
    for start in sorted({0, num_keys // 2, num_keys - 1}):
        num_tokens = num_keys - start
        shape = (2, 3 * num_tokens, num_keys)
        given, gradient = draw(*shape, dtype=dtype, scale=3.0), draw(*shape, dtype=dtype)
        found, around = inside(given)
        kernels.causal_softmax_(found, num_tokens, start)
        changed, around_changed = inside(gradient)
        kernels.causal_softmax_backward_(changed, found, num_tokens, start)
        weights = reference_kernels.causal_softmax_(given.clone(), num_tokens, start)
        expected = reference_kernels.causal_softmax_backward_(gradient.clone(), weights, num_tokens, start)
        assert (found - weights).abs().max() <= TOLERANCES[dtype]
        assert (changed - expected).abs().max() <= 4 * TOLERANCES[dtype]
        assert_untouched(around)
        assert_untouched(around_changed)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 5, 15, 16, 40])
def test_a_score_that_is_no_number_stays_visible_in_its_row_alone(place: int, wrong: float) -> None:
    scores = draw(1, 48, 48, dtype=torch.float32)
    scores[0, 45, place] = wrong
    weights = kernels.causal_softmax_(scores, 48, 0)
    assert weights[0, 45, :46].isnan().any()
    assert weights[0, :45].isfinite().all()
    assert weights[0, 46:].isfinite().all()
    gradient = draw(1, 48, 48, dtype=torch.float32)
    gradient[0, 45, place] = float("nan")
    whole = torch.full((1, 48, 48), 1 / 48)
    assert kernels.causal_softmax_backward_(gradient, whole, 48, 0)[0, 45, :46].isnan().all()
    # What a query does not see has no part in its row.
    scores = draw(1, 48, 48, dtype=torch.float32)
    scores[0, 3, 20] = wrong
    assert kernels.causal_softmax_(scores, 48, 0).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("half", [4, 16, 20, 33])
def test_heads_of_any_size_are_split_and_turned(half: int, dtype: torch.dtype) -> None:
    angles = torch.arange(NUM_TOKENS)[:, None] / 10 ** (torch.arange(half) / half)
    turns = [angles.cos(), angles.sin()]
    columns = (GROUPS + 2) * NUM_KV_HEADS * 2 * half
    qkv = draw(N, columns, dtype=dtype)
    sizes = {"scale": 0.5, "num_kv_heads": NUM_KV_HEADS, "start": 3}

    def run(ops: Any) -> list[torch.Tensor]:
        query, key, value = ops.split_heads(qkv, *turns, **sizes)
        for one in (key, value):
            one[:, :3] = 0
        back, around = inside(torch.zeros(N, columns, dtype=dtype))
        ops.split_heads_backward(query, key, value, *turns, **sizes, out_NE=back)
        assert_untouched(around)
        return [query, key, value, back]

    for one, other in zip(run(kernels), run(reference_kernels), strict=True):
        gap = (one.float() - other.float()).abs().max()
        assert gap <= TOLERANCES[dtype] * max(1.0, float(other.float().abs().max()))


def test_the_loss_and_its_gradient_equal_torchs() -> None:
    logits = draw(N, 300, dtype=torch.float32, scale=4.0).requires_grad_()
    targets = torch.arange(N) * 13
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (expected_gradient,) = torch.autograd.grad(expected.sum(), logits)
    gradient = logits.detach().clone()
    nll, is_right = kernels.softmax_loss_(gradient, targets, keeps_gradient=True)
    assert torch.allclose(nll, expected.detach(), atol=1e-5)
    assert torch.allclose(gradient, expected_gradient, atol=1e-6)
    assert torch.equal(is_right, logits.argmax(dim=-1) == targets)


def test_of_equally_likely_tokens_the_first_counts() -> None:
    logits = torch.zeros(3, 5, dtype=torch.bfloat16)
    _, is_right = kernels.softmax_loss_(logits, torch.tensor([0, 1, 4]), keeps_gradient=False)
    assert is_right.tolist() == [True, False, False]
    assert torch.equal(logits, torch.zeros(3, 5, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_no_number_stays_visible(dtype: torch.dtype, wrong: float) -> None:
    x = draw(2, 96, dtype=dtype)
    x[1, 3] = wrong
    ones = torch.ones(96, dtype=dtype)
    for result in (kernels.rms_norm(x, ones, 1e-5, 96)[0], kernels.gated_silu(x, 48)):
        assert torch.isfinite(result[0]).all()
        assert not torch.isfinite(result[1]).all()
    nll, _ = kernels.softmax_loss_(x.clone(), torch.tensor([3, 4]), keeps_gradient=True)
    assert torch.isfinite(nll[0])
    assert not torch.isfinite(nll[1])
    weights = kernels.causal_softmax_(x.view(1, 2, 96).clone(), 2, 94)
    assert not torch.isfinite(weights[0, 1]).all()


def test_a_tensor_that_is_not_contiguous_is_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        kernels.rms_norm(torch.zeros(4, 8).t(), torch.ones(4), 1e-5, 4)


_SMALL_TEAM = """
import torch
from luthier_cpu.codegen import kernels
torch.set_num_threads(2)
logits, targets = torch.randn(64, 100), torch.arange(64)
expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
nll, _ = kernels.softmax_loss_(logits, targets, keeps_gradient=False)
assert torch.allclose(nll, expected, atol=1e-5), (nll - expected).abs().max()
"""


@pytest.mark.parametrize("limit", ["1", "2", "64"])
def test_all_rows_are_computed_whatever_team_of_threads_comes(limit: str) -> None:
    environment = os.environ | {"OMP_THREAD_LIMIT": limit, "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", _SMALL_TEAM], env=environment, check=True)


@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize("num_threads", [1, 2, 5], indirect=True)
def test_more_threads_than_rows_do_no_harm() -> None:
    x = draw(3, 96, dtype=torch.float32)
    found = kernels.gated_silu(x, 48)
    assert torch.allclose(found, torch.nn.functional.silu(x[:, :48]) * x[:, 48:], atol=1e-5)


@pytest.mark.parametrize("target", [-1, 8, 10**6])
def test_a_target_that_is_no_token_is_refused_before_memory_is_touched(target: int) -> None:
    with pytest.raises(ValueError, match="no token"):
        kernels.softmax_loss_(torch.zeros(1, 8), torch.tensor([target]), keeps_gradient=True)


def test_tensors_of_other_types_or_sizes_than_a_kernel_reads_are_refused() -> None:
    x = torch.zeros(4, 8)
    for weight in (torch.ones(8, dtype=torch.bfloat16), torch.ones(7)):
        with pytest.raises(ValueError, match="rms_norm"):
            kernels.rms_norm(x, weight, 1e-5, 8)
    with pytest.raises(ValueError, match="narrower"):
        kernels.rms_norm(x, torch.ones(8), 1e-5, 4)
    with pytest.raises(ValueError, match="softmax_loss_"):
        kernels.softmax_loss_(x, torch.zeros(3, dtype=torch.int64), keeps_gradient=True)
    with pytest.raises(ValueError, match="gated_silu_backward"):
        kernels.gated_silu_backward(x, torch.zeros(3, 8))
    with pytest.raises(ValueError, match="split_heads"):
        kernels.split_heads(x, *turning(), scale=1.0, num_kv_heads=1, start=0)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        kernels.gated_silu(x.half(), 4)
    with pytest.raises(ValueError, match="causal_softmax_"):
        kernels.causal_softmax_(torch.zeros(1, 4, 3), 4, 0)


def test_a_thread_may_use_fewer_threads_and_leaves_the_others_theirs() -> None:
    if _threads._find_pool() is None:
        pytest.skip("torch's pool is not GNU's")
    seen: list[int] = []

    def run() -> None:
        seen.append(torch.get_num_threads())
        _threads.use_threads(1)
        seen.append(torch.get_num_threads())

    before = torch.get_num_threads()
    for _ in range(2):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert seen == [before, 1, before, 1]
    assert torch.get_num_threads() == before
