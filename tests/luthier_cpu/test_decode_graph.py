"""A step that was written down as a program says to the bit what its kernels say when launched one by one."""

import gc
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.core.shapes import read_shape
from luthier.methods import method_of_artifact
from luthier_cpu.codegen.openmp import Program
from luthier_cpu.decode import decode_graph as packed_program
from luthier_cpu.decode.adapter import PackedAdapter, pack_adapter
from luthier_cpu.decode.batch import Chunk
from luthier_cpu.decode.batch_layout import (
    ATTENTION_IN,
    ATTENTION_OUT,
    FEED_FORWARD_IN,
    FEED_FORWARD_OUT,
    AdapterDescriptor,
    LowRankSite,
    region_entry,
)
from luthier_cpu.decode.blocks import to_blocks
from luthier_cpu.decode.llama import PackedLlama
from luthier_cpu.gemm.products import can_tile
from tests.tiny import BASE_ID, build_tiny_base
from tests.unit.inference.artifacts import build_method_artifact, load_plain

pytestmark = pytest.mark.skipif(
    not can_tile(torch.zeros(1, 32, dtype=torch.bfloat16)), reason="the processor has no products of pairs"
)
TUNINGS = ({"type": "lora", "rank": 4}, {"type": "adapter", "bottleneck_dim": 8})


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("bases") / BASE_ID)


def fill_pages(base: PackedLlama) -> None:
    generator = torch.Generator().manual_seed(0)
    for pages in (base.pages.keys, base.pages.values):
        pages.copy_(torch.randn(pages.shape, generator=generator))


@pytest.fixture
def base(base_folder: Path) -> PackedLlama:
    base = PackedLlama(load_plain(base_folder).bfloat16(), num_pages=200)
    fill_pages(base)
    return base


@pytest.fixture
def adapters(tmp_path: Path, base_folder: Path, base: PackedLlama) -> list[PackedAdapter]:
    plain = load_plain(base_folder)
    weights = {name: module.weight for name, module in plain.named_modules() if hasattr(module, "weight")}
    packed = []
    for number, tuning in enumerate(TUNINGS):
        folder = build_method_artifact(tmp_path / str(number), base_folder, tuning, seed=number).folder
        parts = method_of_artifact(folder).read_parts(folder, read_shape(base_folder))
        assert parts is not None
        packed.append(pack_adapter(parts, base, lambda name: weights[name]))
    return packed


def make_step(seed: int, num_rows: int, adapters: list[PackedAdapter]) -> list[Chunk]:
    """Return rows of random tokens, lengths and adapters, none among them."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(0, 2**31, (num_rows, 3), generator=generator).tolist()
    mixed = [None, *(one.descriptor for one in adapters)]
    return [
        Chunk([token % 40], first % 40, [3 * row, 3 * row + 1, 3 * row + 2], mixed[which % len(mixed)])
        for row, (token, first, which) in enumerate(draws)
    ]


def run_both_ways(base: PackedLlama, step: list[Chunk]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a step's logits as a program, and as single launches on the same pages."""
    keys, values = base.pages.keys.clone(), base.pages.values.clone()
    programs = base._programs
    assert programs is not None
    logits = base.step(step)
    as_program = logits.held_RV.float()
    after = base.pages.keys.clone(), base.pages.values.clone()
    base.pages.keys.copy_(keys)
    base.pages.values.copy_(values)
    base._programs = None
    again = base.step(step)
    launched = again.held_RV.float()
    base._programs = programs
    assert logits.best == again.best == launched.argmax(dim=-1).tolist()
    assert torch.equal(after[0], base.pages.keys)
    assert torch.equal(after[1], base.pages.values)
    return as_program, launched


@pytest.mark.usefixtures("num_threads")
def test_steps_of_any_rows_and_adapters_agree(base: PackedLlama, adapters: list[PackedAdapter]) -> None:
    for seed, num_rows in enumerate((1, 3, 3, 16, 1, 64, 3, 4, 2, 6)):
        mixed = adapters if seed % 2 else []
        as_program, launched = run_both_ways(base, make_step(seed, num_rows, mixed))
        assert torch.equal(as_program, launched)


@pytest.mark.usefixtures("num_threads")
def test_last_tokens_say_alone_what_they_say_among_all(
    base: PackedLlama, adapters: list[PackedAdapter]
) -> None:
    """Of rows and chunks that run in another order than given, each with weights of its own."""
    lengths = (1, 5, 20, 1, 2, 9, 33)
    mixed = [None, *(one.descriptor for one in adapters)]

    def step(*, wants_all: bool) -> list[Chunk]:
        return [
            Chunk(
                [(7 * row + 3 * place) % 40 for place in range(length)],
                0,
                [3 * row, 3 * row + 1, 3 * row + 2],
                mixed[row % len(mixed)],
                wants_all_logits=wants_all,
            )
            for row, length in enumerate(lengths)
        ]

    alone_RV = base.step(step(wants_all=False)).held_RV.float().clone()
    ends = [sum(lengths[: row + 1]) - 1 for row in range(len(lengths))]
    among_RV = base.step(step(wants_all=True)).held_RV[ends].float()
    distances_RR = torch.cdist(alone_RV, among_RV) / among_RV.norm(dim=-1)
    assert distances_RR.argmin(dim=-1).tolist() == list(range(len(lengths)))
    assert distances_RR.diagonal().max() < 0.02


@pytest.mark.parametrize("num_threads", [2], indirect=True)
@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize(("num_rows", "num_fewer"), [(4, 4), (3, 3)])
def test_threads_meet_only_where_one_reads_what_another_wrote(
    base: PackedLlama, adapters: list[PackedAdapter], num_rows: int, num_fewer: int
) -> None:
    programs = base._programs
    assert programs is not None
    step = [
        Chunk([3], 5, [3 * row, 3 * row + 1], adapters[0].descriptor if row else None)
        for row in range(num_rows)
    ]
    base.step(step)
    [program] = programs._programs.values()
    # A row's updates and what follows on that row; attention where both threads have as many rows.
    assert len(program) - program._meets.sum() == num_fewer * base.num_layers
    plain = [Chunk([3], 5, [3 * row, 3 * row + 1]) for row in range(num_rows)]
    base.step(plain)
    assert all(programs._programs[(num_rows, False, False, True)]._meets)


@pytest.mark.usefixtures("num_threads")
def test_rows_of_one_sequence_say_what_each_says_a_step_later(
    base: PackedLlama, adapters: list[PackedAdapter]
) -> None:
    programs = base._programs
    assert programs is not None
    for count, adapter in ((2, None), (5, adapters[0].descriptor), (8, adapters[1].descriptor)):
        # Across the border of a page, and beside a row of another sequence.
        tokens = [(7 * number + 3) % 40 for number in range(count)]
        beside = Chunk([3], 20, [8, 9])
        longer = Chunk(tokens, 14, [0, 1, 2], adapter, num_first_logits=count - 1, by_rows=True)
        assert programs.can_run([beside, longer])
        logits = base.step([beside, longer])
        together = logits.held_RV.float().clone()
        assert logits.best == together.argmax(dim=-1).tolist()
        alone = []
        for number, token in enumerate(tokens):
            rows = [Chunk([3], 20, [8, 9]), Chunk([token], 14 + number, [0, 1, 2], adapter)]
            found = base.step(rows).held_RV.float().clone()
            alone.append(found[1])
            assert gap(found[0], together[0]) < 0.02
        assert gap(torch.stack(alone), together[1:]) < 0.02
        # Any other token before would have been seen.
        other = base.step([beside, replace(longer, tokens=[tokens[0] + 1, *tokens[1:]])])
        assert gap(other.held_RV[2:].float(), together[2:]) > 0.05


def gap(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def test_rows_of_one_sequence_attend_when_all_are_in_their_pages(base: PackedLlama) -> None:
    programs = base._programs
    assert programs is not None
    base.step([Chunk([3, 4, 5, 6], 14, [0, 1, 2], num_first_logits=3, by_rows=True)])
    [program] = programs._programs.values()
    assert len(program) == base.num_layers * 9 + 3 and all(program._meets)
    with pytest.raises(ValueError, match="wants the logits"):
        base.step([Chunk([3, 4], 14, [0, 1, 2], by_rows=True)])


@pytest.fixture
def wide_base() -> PackedLlama:
    """A base with heads that the kernels of chunks take."""
    config = LlamaConfig(
        vocab_size=70,
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    base = PackedLlama(LlamaForCausalLM(config).bfloat16().eval(), num_pages=200)
    fill_pages(base)
    return base


def make_adapter(base: PackedLlama, rank: int, seed: int) -> AdapterDescriptor:
    generator = torch.Generator().manual_seed(seed)
    inputs = (96, 96, 96, 96, 96, 96, 160)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * 0.2).bfloat16()

    def site(width: int, outputs: int) -> LowRankSite:
        return LowRankSite(draw(rank, width), to_blocks(draw(rank, outputs)))

    layers = [list(map(site, inputs, base.site_widths)) for _ in range(2)]
    return AdapterDescriptor(layers, [[None, None]] * 2)


@pytest.mark.usefixtures("num_threads")
def test_steps_with_chunks_are_programs_and_agree(
    wide_base: PackedLlama, monkeypatch: pytest.MonkeyPatch, num_threads: int
) -> None:
    runs: list[int] = []
    run = Program.run

    def count(program: Program) -> None:
        runs.append(len(program))
        run(program)

    monkeypatch.setattr(Program, "run", count)
    adapters = [None, make_adapter(wide_base, 4, 1), make_adapter(wide_base, 20, 2)]
    chunks = [
        Chunk(list(range(9)), 5, [150, 151], adapters[1]),
        Chunk(list(range(20)), 0, [152, 153], None, wants_all_logits=True),
        Chunk(list(range(33)), 3, [154, 155, 156], adapters[2], num_first_logits=2),
    ]
    rows = [Chunk([token], 3 * token, [token, 40 + token], adapters[token % 3]) for token in range(1, 5)]
    for number, step in enumerate((chunks, [*rows, *chunks], [*chunks, *rows])):
        as_program, launched = run_both_ways(wide_base, step)
        assert torch.equal(as_program, launched)
        assert len(runs) == number + 1


def test_a_last_token_after_a_chunk_sees_it_as_it_would_a_step_later(wide_base: PackedLlama) -> None:
    descriptor, tokens = make_adapter(wide_base, 4, 3), list(range(1, 22))
    begin = Chunk(tokens[:-1], 2, [150, 151], descriptor, wants_logits=False, num_first_logits=2)
    last = Chunk(tokens[-1:], 22, [150, 151], descriptor)
    wide_base.pages.keys.zero_()
    wide_base.pages.values.zero_()
    together = wide_base.step([begin, last]).held_RV.float().clone()
    first = wide_base.step([begin]).held_RV.float().clone()
    after = wide_base.step([last]).held_RV.float().clone()
    torch.testing.assert_close(together, torch.cat([first, after]), rtol=0.05, atol=0.05)
    assert not torch.allclose(together[2], together[1], atol=0.05)


def test_steps_whose_adapters_are_not_all_kernels_are_launched(
    wide_base: PackedLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[Program] = []
    monkeypatch.setattr(Program, "run", lambda program: runs.append(program))  # noqa: PLW0108
    tokens = list(range(9))
    wide_base.step([Chunk(tokens, 5, [150, 151], make_adapter(wide_base, 132, 4))])
    assert not runs
    wide_base.step([Chunk(tokens, 5, [150, 151], make_adapter(wide_base, 128, 4))])
    assert len(runs) == 1


def test_an_adapter_has_the_regions_of_what_is_read_together(adapters: list[PackedAdapter]) -> None:
    descriptor = adapters[0].descriptor
    assert descriptor is not None
    for layer, all_sites in enumerate(descriptor.low_ranks):
        for group in (ATTENTION_IN, ATTENTION_OUT, FEED_FORWARD_IN, FEED_FORWARD_OUT):
            entry = region_entry(layer, group)
            begin, num_bytes = descriptor.table[entry : entry + 2].tolist()
            sites = [site for site in all_sites[group] if site is not None]
            if not sites:
                assert (begin, num_bytes) == (0, 0)
                continue
            assert begin == sites[0].a_RK.data_ptr()
            assert begin + num_bytes == sites[-1].b.data_ptr() + sites[-1].b.nbytes


def test_programs_are_made_anew_for_other_threads(base: PackedLlama, adapters: list[PackedAdapter]) -> None:
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 3, 2):
            torch.set_num_threads(num_threads)
            as_program, launched = run_both_ways(base, make_step(7, 5, adapters))
            assert torch.equal(as_program, launched)
    finally:
        torch.set_num_threads(before)


def test_a_program_does_not_outlive_the_memory_it_works_in(
    base: PackedLlama, adapters: list[PackedAdapter]
) -> None:
    """A step of another kind, on more threads, lets the kernels' memory move."""
    before, step = torch.get_num_threads(), make_step(7, 5, adapters)
    programs = base._programs
    assert programs is not None
    try:
        torch.set_num_threads(2)
        base.step(step)
        first = dict(programs._programs)
        torch.set_num_threads(4)
        base.step([Chunk([3, 4, 5], 0, [150], adapters[0].descriptor)])
        torch.set_num_threads(2)
        as_program, launched = run_both_ways(base, step)
        assert torch.equal(as_program, launched)
        assert not set(first.values()) & set(programs._programs.values())
    finally:
        torch.set_num_threads(before)


def test_a_base_leaves_the_memory_when_nothing_refers_to_it(base_folder: Path) -> None:
    base = PackedLlama(load_plain(base_folder).bfloat16(), num_pages=4)
    base.step([Chunk([3], 0, [1])])
    seen, weights = weakref.ref(base), weakref.ref(base._head)
    gc.disable()
    try:
        del base
        assert seen() is None
        assert weights() is None
    finally:
        gc.enable()


def test_only_a_few_programs_are_kept(
    monkeypatch: pytest.MonkeyPatch, base: PackedLlama, adapters: list[PackedAdapter]
) -> None:
    monkeypatch.setattr(packed_program, "_MAX_PROGRAMS", 2)
    programs = base._programs
    assert programs is not None
    for num_rows in (1, 2, 3, 1, 2, 3):
        as_program, launched = run_both_ways(base, make_step(num_rows, num_rows, adapters))
        assert torch.equal(as_program, launched)
    assert len(programs._programs) == 2


def test_other_steps_are_no_programs(base: PackedLlama) -> None:
    programs, one = base._programs, Chunk([3], 0, [0])
    assert programs is not None
    assert programs.can_run([one] * packed_program.MAX_ROWS)
    assert not programs.can_run([one] * (packed_program.MAX_ROWS + 1))
    assert not programs.can_run([one, Chunk([3, 4], 0, [1])])
    assert not programs.can_run([one, Chunk([3], 0, [1], wants_logits=False)])
    few = Chunk([3, 4], 0, [1], num_first_logits=1, by_rows=True)
    assert programs.can_run([few] * (packed_program.MAX_ROWS // 2))
    assert not programs.can_run([one, *[few] * (packed_program.MAX_ROWS // 2)])
    assert not programs.can_run([Chunk([3, 4], 0, [1], by_rows=True)])
    assert not programs.can_run([])
