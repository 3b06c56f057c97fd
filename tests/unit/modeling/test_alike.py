"""An adapter that is laid out as an earlier one was is laid out as if it had come first."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from luthier.methods._served import BottleneckPart, LowRankPart, ServedParts
from luthier.modeling import kernels
from luthier.modeling.alike import Layout, Layouts
from luthier.modeling.kernels.page_memory import take_large
from luthier.modeling.packed_adapter import PackedAdapter, lay_out
from luthier.modeling.packed_llama import PackedLlama
from luthier.modeling.packed_work import Stretch
from tests.unit.modeling.small_llama import small_llama

pytestmark = pytest.mark.skipif(
    not kernels.is_compiled(torch.empty(1)), reason="without numba nothing is laid out by a kernel"
)
_SHAPES = {"self_attn.q_proj": (64, 64), "self_attn.o_proj": (64, 64), "mlp.down_proj": (64, 96)}
_RANKS = {"self_attn.q_proj": 3, "self_attn.o_proj": 8, "mlp.down_proj": 16}


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16])
def base(request: pytest.FixtureRequest) -> PackedLlama:
    return PackedLlama(small_llama(request.param), num_pages=16)


class File:
    """The numbers of an adapter, drawn, one behind the other as in a file."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        count = 2 * sum(_RANKS[name] * sum(shape) for name, shape in _SHAPES.items())
        self.numbers = torch.randn(count + 7, generator=generator) * 0.3
        parts, begin = [], 7
        for layer in range(2):
            for name, (num_outputs, num_inputs) in _SHAPES.items():
                rank = _RANKS[name]
                a_RK = self.numbers[begin : begin + rank * num_inputs].view(rank, num_inputs)
                begin += a_RK.numel()
                b_OR = self.numbers[begin : begin + rank * num_outputs].view(num_outputs, rank)
                begin += b_OR.numel()
                parts.append(LowRankPart(f"model.layers.{layer}.{name}", a_RK, b_OR, 0.5))
        self.parts = ServedParts(tuple(parts))
        self.length = self.numbers.nbytes

    @property
    def place(self) -> range:
        return range(self.numbers.data_ptr(), self.numbers.data_ptr() + self.length)


def read_weight(path: str) -> torch.Tensor:
    return torch.ones(_SHAPES[path.split(".", 3)[3]])


def layout_of(base: PackedLlama, file: File) -> Layout | None:
    return Layout.of(file.parts, lay_out(file.parts, base, read_weight), base, file.place)


def logits_of(base: PackedLlama, adapter: PackedAdapter) -> torch.Tensor:
    """Run a stretch, then a row behind it, whose kernels read the table in another way."""
    pages = [1, 2]
    begun = Stretch([5, 6, 7, 8], 0, pages, adapter.described, wants_all_logits=True)
    return torch.cat(
        [base.step([one]).held_RV.clone() for one in (begun, Stretch([9], 4, pages, adapter.described))]
    )


def test_numbers_and_answers_are_those_of_an_adapter_that_came_first(base: PackedLlama) -> None:
    layout = layout_of(base, File(1))
    assert layout is not None
    other = File(2)
    expected = lay_out(other.parts, base, read_weight)
    taken: list[torch.Tensor] = []

    def take(num_bytes: int) -> torch.Tensor:
        # What was there before must not show through.
        taken.append(take_large(num_bytes).fill_(0x41))
        return taken[-1]

    found, are_finite = layout.lay(other.place, take)
    assert are_finite
    assert found.described is not None
    assert expected.described is not None
    for own, theirs in zip(found.described.low_ranks, expected.described.low_ranks, strict=True):
        for site, like in zip(own, theirs, strict=True):
            assert (site is None) == (like is None)
            if site is not None and like is not None:
                assert torch.equal(site.a_RK, like.a_RK)
                assert torch.equal(site.b, like.b)
                assert site.factor_O is None
    assert (found.described.max_rank, found.num_bytes) == (expected.described.max_rank, expected.num_bytes)
    # Numbers that are no addresses are the same, and of addresses the distances.
    tables = [one.described.table for one in (found, expected) if one.described is not None]
    begins = [table[table > 2**32].min() for table in tables]
    moved = [
        torch.where(table > 2**32, table - begin, table) for table, begin in zip(tables, begins, strict=True)
    ]
    assert torch.equal(*moved)
    assert begins[0] == taken[0].data_ptr()
    assert torch.equal(logits_of(base, found), logits_of(base, expected))
    assert not torch.equal(logits_of(base, found), logits_of(base, lay_out(File(3).parts, base, read_weight)))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_a_number_that_is_not_finite_is_found_wherever_it_stands(base: PackedLlama, wrong: float) -> None:
    layout, other = layout_of(base, File(1)), File(2)
    assert layout is not None
    _, are_finite = layout.lay(other.place, take_large)
    assert are_finite
    for place in (7, 8, 40, 7 + 3 * 64, 7 + 3 * 64 + 1, len(other.numbers) // 2, len(other.numbers) - 1):
        before = other.numbers[place].item()
        other.numbers[place] = wrong
        _, are_finite = layout.lay(other.place, take_large)
        assert not are_finite
        other.numbers[place] = before
    # What lies beside its tensors is none of its numbers.
    other.numbers[:7] = wrong
    assert layout.lay(other.place, take_large)[1]


def _with_magnitudes(file: File) -> ServedParts:
    parts = [replace(one, magnitude_O=torch.ones(len(one.b_OR))) for one in file.parts.low_ranks]
    return ServedParts(tuple(parts))


def _with_bottleneck(file: File) -> ServedParts:
    down = BottleneckPart(
        "model.layers.0.mlp",
        torch.randn(4, 64),
        torch.zeros(4),
        torch.randn(64, 4),
        torch.zeros(64),
        "gelu",
        is_parallel=False,
    )
    return ServedParts(file.parts.low_ranks, (down,))


def _with_virtual_tokens(file: File) -> ServedParts:
    return ServedParts(file.parts.low_ranks, embeddings_ND=torch.zeros(2, 64))


def _of_another_type(file: File) -> ServedParts:
    def half(tensor: torch.Tensor) -> torch.Tensor:
        held = tensor.view(torch.bfloat16).flatten()[: tensor.numel()].view(tensor.shape)
        return held.nan_to_num_(0.1, 0.1, 0.1).clamp_(-1, 1)

    parts = [replace(one, a_RK=half(one.a_RK), b_OR=half(one.b_OR)) for one in file.parts.low_ranks]
    assert all(one.a_RK.data_ptr() in file.place for one in parts)
    return ServedParts(tuple(parts))


def _from_elsewhere(file: File) -> ServedParts:
    parts = [replace(one, a_RK=one.a_RK.clone(), b_OR=one.b_OR.clone()) for one in file.parts.low_ranks]
    return ServedParts(tuple(parts))


def _beyond_the_end(file: File) -> ServedParts:
    file.length -= 1
    return file.parts


@pytest.mark.parametrize(
    "change",
    [
        _with_magnitudes,
        _with_bottleneck,
        _with_virtual_tokens,
        _of_another_type,
        _from_elsewhere,
        _beyond_the_end,
    ],
)
def test_what_takes_more_than_to_move_numbers_has_no_layout(
    base: PackedLlama, change: Callable[[File], ServedParts]
) -> None:
    file = File(1)
    parts = change(file)
    assert Layout.of(parts, lay_out(parts, base, read_weight), base, file.place) is None


def test_a_file_of_another_length_is_refused(base: PackedLlama) -> None:
    layout, other = layout_of(base, File(1)), File(2)
    assert layout is not None
    other.length -= 4
    with pytest.raises(ValueError, match="as long"):
        layout.lay(other.place, take_large)


def test_only_so_many_layouts_are_kept(base: PackedLlama) -> None:
    layout, layouts = layout_of(base, File(1)), Layouts()
    assert layout is not None
    for number in range(20):
        layouts.keep(number, layout)
        # Who is asked for stays.
        assert layouts.find(0) is layout
    assert [number for number in range(20) if layouts.find(number) is not None] == [0, *range(5, 20)]
