"""A base is loaded as the library loads it, with a fraction of the memory, or refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from luthier.core.errors import BaseUnavailableError
from luthier.modeling.load import load_base, read_weights
from tests.tiny import build_tiny_base

WEIGHTS_NAME = "model.safetensors"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return build_tiny_base(tmp_path / "tiny")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_what_the_library_loads(base, dtype):
    found = load_base(base, dtype=dtype, device="cpu")
    expected = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    pairs = [*zip(found.state_dict().items(), expected.state_dict().items(), strict=True)]
    pairs += zip(found.named_buffers(), expected.named_buffers(), strict=True)
    for (name, tensor), (other_name, other) in pairs:
        assert name == other_name
        assert torch.equal(tensor, other)
    assert found.config.to_dict() == expected.config.to_dict()
    assert found.generation_config.to_dict() == expected.generation_config.to_dict()
    assert found.get_output_embeddings().weight is found.get_input_embeddings().weight
    assert not any(parameter.requires_grad for parameter in found.parameters())


def test_a_base_in_several_files_is_whole(base):
    weights = load_file(base / WEIGHTS_NAME)
    (base / WEIGHTS_NAME).unlink()
    names = sorted(weights)
    for number, part in enumerate((names[:5], names[5:])):
        save_file({name: weights[name] for name in part}, base / f"model-0000{number}-of-00002.safetensors")
    found = read_weights(base, torch.float32)
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in names)
    load_base(base, dtype=torch.float32, device="cpu")


def test_a_file_that_was_cut_off_is_refused(base):
    content = (base / WEIGHTS_NAME).read_bytes()
    for size in (4, 40, len(content) - 1):
        (base / WEIGHTS_NAME).write_bytes(content[:size])
        with pytest.raises(BaseUnavailableError):
            load_base(base, dtype=torch.float32, device="cpu")


def test_missing_weights_are_refused_and_never_random(base):
    weights = load_file(base / WEIGHTS_NAME)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, base / WEIGHTS_NAME)
    with pytest.raises(BaseUnavailableError, match="not those of its architecture"):
        load_base(base, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("architectures", [None, ["NoSuchForCausalLM"], ["__doc__"]], ids=str)
def test_an_architecture_that_the_library_does_not_know_is_refused(base, architectures):
    config = json.loads((base / "config.json").read_text()) | {"architectures": architectures}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseUnavailableError):
        load_base(base, dtype=torch.float32, device="cpu")


def test_an_empty_folder_is_refused(tmp_path, base):
    shutil.copytree(base, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(BaseUnavailableError):
        load_base(tmp_path / "bare", dtype=torch.float32, device="cpu")
