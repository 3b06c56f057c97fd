"""A packed base and its adapters say what the plain path says, and compiled operations what plain ones do."""

import itertools
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from luthier.core.shapes import read_shape
from luthier.methods import discover, method_of_artifact
from luthier_cpu.decode import linear as packed_linear
from luthier_cpu.decode.adapter import can_pack_adapter, pack_adapter
from luthier_cpu.decode.batch import Chunk
from luthier_cpu.decode.batch_layout import PAGE_SIZE
from luthier_cpu.decode.linear import PackedLinear
from luthier_cpu.decode.llama import PackedLlama, WeightMemory, can_pack_llama
from tests.tiny import BASE_ID, build_tiny_base
from tests.tiny_shapes import SHAPES, build_shape
from tests.unit.inference.artifacts import all_tunings, build_method_artifact, load_plain, tuning_name

ON_BASE = [tuning for tuning in all_tunings() if not discover()[tuning["type"]].is_whole_model]
PAGES = [3, 0, 2, 5]
IDS = [(7 * number) % 40 + 3 for number in range(40)]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_base(tmp_path_factory.mktemp("bases") / BASE_ID)


def make_packed(folder: Path) -> PackedLlama:
    return PackedLlama(load_plain(folder), num_pages=8)


@pytest.mark.parametrize("num_rows", [1, 3, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("can_pack", [True, False])
def test_a_packed_product_is_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, num_rows: int, dtype: torch.dtype, can_pack: bool
) -> None:
    if not can_pack:
        monkeypatch.setattr(packed_linear, "can_pack", lambda _: False)
    generator = torch.Generator().manual_seed(1)
    weight_OK = torch.randn(48, 96, generator=generator).to(dtype)
    x_NK = torch.randn(num_rows, 96, generator=generator).to(dtype)
    tolerance = 1e-4 if dtype is torch.float32 else 0.2
    expected_NO = functional.linear(x_NK, weight_OK)
    torch.testing.assert_close(PackedLinear(weight_OK)(x_NK), expected_NO, atol=tolerance, rtol=1e-2)


@pytest.mark.parametrize("name", SHAPES)
def test_a_base_is_packed_only_where_every_part_is_known(tmp_path: Path, name: str) -> None:
    model = load_plain(build_shape(tmp_path / name, name))
    assert can_pack_llama(model) == name.startswith("llama")
    if not can_pack_llama(model):
        return
    with torch.inference_mode():
        expected_TV = model(torch.tensor([IDS])).logits[0]
    packed = PackedLlama(model, num_pages=8)
    logits_1V = packed.step([Chunk(IDS, 0, PAGES)]).held_RV.float()
    torch.testing.assert_close(logits_1V[0], expected_TV[-1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_never_in_memory_twice_while_a_base_is_packed(
    base_folder: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_plain(base_folder).to(dtype)
    pack, held = WeightMemory.pack, []

    def count(memory: WeightMemory, *weights: torch.Tensor) -> PackedLinear:
        linears = [one for name, one in model.model.layers.named_parameters() if "norm" not in name]
        held.append(sum(one.untyped_storage().nbytes() for one in linears))
        return pack(memory, *weights)

    monkeypatch.setattr(WeightMemory, "pack", count)
    PackedLlama(model, num_pages=8)
    # Four products a layer, then the output layer.
    num_layers = len(model.model.layers)
    expected = [held[0] * (num_layers - layer) // num_layers for layer in range(num_layers + 1)]
    assert held[0] > 0
    assert held[::4] == expected


@pytest.mark.parametrize("way", ["one-by-one", "at-once"])
@pytest.mark.parametrize("tuning", ON_BASE, ids=tuning_name)
def test_an_adapter_says_what_its_method_says_however_its_tokens_are_cut(
    tmp_path: Path, base_folder: Path, tuning: dict[str, object], way: str
) -> None:
    artifact = build_method_artifact(tmp_path / "a", base_folder, tuning, seed=3)
    method, plain = method_of_artifact(artifact.folder), load_plain(base_folder)
    weights = {name: module.weight for name, module in plain.named_modules() if hasattr(module, "weight")}
    packed = make_packed(base_folder)
    if way == "at-once":
        # As long sequences do.
        packed.ops.max_alone = 4
    parts = method.read_parts(artifact.folder, read_shape(base_folder))
    assert parts is not None and can_pack_adapter(parts, packed)
    adapter = pack_adapter(parts, packed, weights.__getitem__)
    with torch.inference_mode():
        attached = method.load(load_plain(base_folder), artifact.folder)
        expected_TV = method.logits(attached, torch.tensor([IDS]))[0]
    start = adapter.num_virtual_tokens
    if adapter.embeddings_ND is not None:
        packed.step([Chunk(adapter.embeddings_ND, 0, PAGES, wants_logits=False)])
        adapter.take_key_values(*packed.pages.read(PAGES, start))
    if adapter.keys_NLHC is not None and adapter.values_NLHC is not None:
        positions = torch.arange(start)
        pages = torch.tensor(PAGES)[positions // PAGE_SIZE]
        packed.pages.write(pages, positions % PAGE_SIZE, adapter.keys_NLHC, adapter.values_NLHC)
    cuts = [0, 7, 8, 9, 21, 22, 38, 39, 40]
    for begin, end in itertools.pairwise(cuts):
        chunk = Chunk(IDS[begin:end], start + begin, PAGES, adapter.descriptor)
        logits_1V = packed.step([chunk]).held_RV.float()
        torch.testing.assert_close(logits_1V[0], expected_TV[end - 1], atol=2e-4, rtol=1e-4)
    assert adapter.num_bytes > 0
