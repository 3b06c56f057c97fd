"""The probe on architectures of every kind, and what it leaves of the base that it measures."""

from pathlib import Path

import pytest
import torch

from luthier.bases.catalogue import FACTS_NAME
from luthier.core.shapes import read_shape
from luthier.methods import Start, Workload, discover
from luthier.modeling.load import load_base
from luthier.training.calibrate import calibrate
from luthier.training.calibrate_probe import Cut, cut_base, random_batch
from tests.tiny import VOCAB_SIZE
from tests.tiny_shapes import build_shape, facts_of


@pytest.mark.parametrize(
    ("name", "path"), [("llama-untied", "fused"), ("gpt2", "plain"), ("gemma3", "plain")]
)
def test_every_method_is_measured_on_every_kind_of_base(tmp_path: Path, name: str, path: str) -> None:
    folder = build_shape(tmp_path / name, name)
    (folder / FACTS_NAME).write_text(facts_of(name).model_dump_json())
    found = calibrate(folder, device="cpu", precision="float32", num_threads=1)
    assert (found.device, found.precision, found.bytes_per_number) == ("cpu", "float32", 4)
    assert set(discover()) <= set(found.variants)
    assert found.variants["lora"].path == path
    for variant in found.variants.values():
        assert variant.token_layer_seconds >= 0
        # At least a layer's input and output are kept.
        assert variant.token_layer_bytes > 48 * 4
    assert found.imports_bytes > 100 * 1024**2
    assert found.loaded_bytes >= found.resident_bytes
    again = calibrate(folder, device="cpu", precision="float32", num_threads=1, skipped=list(found.variants))
    assert set(again.variants).isdisjoint(set(found.variants) - {found.reference})


@pytest.mark.parametrize("name", list(discover()))
def test_a_cut_copy_trains_its_method_and_leaves_the_base_as_it_was(tmp_path: Path, name: str) -> None:
    folder = build_shape(tmp_path / "llama", "llama")
    base = load_base(folder, dtype=torch.float32, device="cpu")
    before = {key: value.clone() for key, value in base.state_dict().items()}
    method = discover()[name]
    params = method.resolve(method.Params(type=name), Workload(facts_of("llama"), 50, 1000))
    cut = Cut(
        cut_base(base, 1),
        method,
        params,
        start=Start(seed=0, base_id="tiny", tokenize=lambda _text: [1], examples=[[3, 4, 5, 6]]),
        shape=read_shape(folder),
        device="cpu",
        sample=random_batch(1, 8, 4, VOCAB_SIZE),
    )
    assert cut.num_layers == 1
    assert cut.cost.num_parameters == cut.attached.num_trained_parameters
    batch = random_batch(2, 16, 4, VOCAB_SIZE)
    assert cut.seconds(batch) > 0
    assert any(gradient.abs().sum() > 0 for gradient in cut.trainee.gradients)
    assert cut.kept_bytes(batch) > cut.kept_bytes(random_batch(1, 16, 4, VOCAB_SIZE)) > 0
    assert cut.head_seconds(8) > 0
    assert cut.scoring_seconds(batch) > 0
    after = base.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
