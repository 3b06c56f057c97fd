"""What adapters promise beyond what every method does: their places, their format, many on one base."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    OPTConfig,
    PreTrainedModel,
)

from luthier.core.errors import ArtifactCorruptError, InvalidValueError
from luthier.methods import Attached, Start, Workload
from luthier.methods.adapter import LOADER, METHOD, AdapterParams
from luthier.modeling.load import load_base
from tests.tiny import VOCAB_SIZE
from tests.tiny_shapes import HIDDEN_SIZE, SHAPES, build_shape, facts_of

ROOT = Path(__file__).parents[2]
PLACEMENTS = ["houlsby", "pfeiffer", "parallel"]
TOKENS_BT = torch.from_numpy(np.random.default_rng(0).integers(3, VOCAB_SIZE, (2, 30)))


def start(seed: int = 5) -> Start:
    return Start(seed, "tiny", tokenize=lambda _text: [])


def params(**fields: Any) -> AdapterParams:
    asked = AdapterParams(**{"bottleneck_dim": 7, **fields})
    return METHOD.resolve(asked, Workload(facts_of("llama"), num_rows=10, num_tokens=100))


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return load_base(folder, dtype=dtype, device="cpu")


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS_BT, use_cache=False).logits


@torch.no_grad()
def learn(attached: Attached, seed: int = 0) -> None:
    """Give every trained weight a value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in attached.named_trained_parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def make(base: Path, folder: Path, seed: int = 0, **fields: Any) -> torch.Tensor:
    """Write an artifact; return the logits of the model that it was made from."""
    attached = METHOD.attach(load(base), params(**fields), start())
    learn(attached, seed)
    folder.mkdir(parents=True)
    METHOD.save(attached, folder)
    attached.model.eval()
    return logits(attached.model)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_shape(tmp_path_factory.mktemp("bases") / "llama", "llama")


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_placement_works_on_every_shape(shape: str, placement: str, tmp_path: Path) -> None:
    base = build_shape(tmp_path / "base", shape)
    attached = METHOD.attach(load(base), params(placement=placement), start())
    expected = logits(load(base))
    assert torch.equal(logits(attached.model), expected)
    learn(attached)
    tuned = logits(attached.model)
    assert not torch.allclose(tuned, expected, atol=1e-2)
    METHOD.save(attached, tmp_path)
    assert torch.equal(logits(METHOD.load(load(base), tmp_path).model), tuned)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_each_placement_computes_what_its_paper_says(llama: Path, placement: str) -> None:
    attached = METHOD.attach(load(llama), params(placement=placement, activation="tanh"), start())
    learn(attached)

    def update(bottleneck: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        middle = torch.tanh(x @ bottleneck.down.weight.T + bottleneck.down.bias)
        return middle @ bottleneck.up.weight.T + bottleneck.up.bias

    plain = load(llama)
    x = plain.model.embed_tokens(TOKENS_BT)
    rotary = plain.model.rotary_emb(x, torch.arange(TOKENS_BT.shape[1])[None])
    with torch.no_grad():
        for layer, tuned in zip(plain.model.layers, attached.causal_lm.model.layers, strict=True):
            attended = layer.self_attn(layer.input_layernorm(x), position_embeddings=rotary)[0]
            if placement == "houlsby":
                attended = attended + update(tuned.attention_bottleneck, attended)
            x = x + attended
            normed = layer.post_attention_layernorm(x)
            fed = layer.mlp(normed)
            read = normed if placement == "parallel" else fed
            x = x + fed + update(tuned.feed_forward_bottleneck, read)
        expected = plain.lm_head(plain.model.norm(x))
    assert torch.allclose(logits(attached.model), expected, atol=1e-4)


def test_trained_weights_are_float32_on_a_bf16_base_and_the_result_is_bf16(llama: Path) -> None:
    attached = METHOD.attach(load(llama, torch.bfloat16), params(), start())
    assert {value.dtype for _, value in attached.named_trained_parameters()} == {torch.float32}
    assert torch.equal(logits(attached.model), logits(load(llama, torch.bfloat16)))


def test_norms_after_a_half_come_before_the_bottleneck() -> None:
    config = Gemma2Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=80,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
    )
    from luthier.methods._bottleneck import find_sites

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert [module.rpartition(".")[2] for module in find_sites(model, "houlsby").values()] == [
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    ]
    assert [module.rpartition(".")[2] for module in find_sites(model, "parallel").values()] == ["mlp"]


def test_dropout_acts_in_training_alone(llama: Path) -> None:
    attached = METHOD.attach(load(llama), params(dropout=0.5), start())
    learn(attached)
    attached.model.eval()
    assert torch.equal(logits(attached.model), logits(attached.model))
    attached.model.train()
    assert not torch.equal(logits(attached.model), logits(attached.model))


def test_a_base_without_named_halves_is_refused_with_what_it_has() -> None:
    config = OPTConfig(
        vocab_size=50,
        hidden_size=16,
        ffn_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        word_embed_proj_dim=16,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InvalidValueError, match="fc1, fc2") as caught:
        METHOD.attach(model, params(), start())
    assert caught.value.param == "tuning.type"


def test_a_bottleneck_wider_than_the_base_is_refused(llama: Path) -> None:
    wide = AdapterParams(bottleneck_dim=HIDDEN_SIZE + 1, dropout=0.0)
    for attempt in (lambda: METHOD.attach(load(llama), wide, start()), lambda: params(bottleneck_dim=49)):
        with pytest.raises(InvalidValueError, match="48") as caught:
            attempt()
        assert caught.value.param == "tuning.bottleneck_dim"


def documented_loader() -> str:
    text = (ROOT / "docs" / "adapter-format.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]


@pytest.mark.parametrize("shape", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_documented_loader_gives_the_trained_logits(shape: str, placement: str, tmp_path: Path) -> None:
    base = build_shape(tmp_path / "base", shape)
    expected = make(base, tmp_path / "artifact", placement=placement, activation="silu")
    scope: dict[str, Any] = {}
    exec(documented_loader(), scope)
    model = scope["load_adapter"](AutoModelForCausalLM.from_pretrained(base), tmp_path / "artifact")
    assert torch.equal(logits(model), expected)


def test_the_card_and_the_document_hold_one_loader() -> None:
    assert documented_loader() == LOADER
    assert LOADER in METHOD.loading


def test_an_artifact_is_two_files_that_name_the_base_and_no_path(llama: Path, tmp_path: Path) -> None:
    make(llama, tmp_path / "a", placement="pfeiffer")
    make(llama, tmp_path / "b", placement="pfeiffer")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors"]
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "tiny"
    assert config["bottlenecks"][0] == {
        "name": "model.layers.0.feed_forward_bottleneck",
        "module": "model.layers.0.mlp",
    }
    assert METHOD.recognises(tmp_path / "a")
    assert not METHOD.recognises(llama)


def _lose_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, folder / "adapter_model.safetensors")


def _add_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(weights | {"more": torch.zeros(1)}, folder / "adapter_model.safetensors")


def _widen_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in weights if name.endswith("down.weight"))
    save_file(weights | {name: torch.zeros(7, HIDDEN_SIZE + 1)}, folder / "adapter_model.safetensors")


def _cut_the_weights(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:200])


def _point_elsewhere(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace("model.layers.0.mlp", "lm_head"))


@pytest.mark.parametrize(
    "damage", [_lose_a_tensor, _add_a_tensor, _widen_a_tensor, _cut_the_weights, _point_elsewhere]
)
def test_a_damaged_artifact_is_refused_and_the_base_is_as_it_was(
    damage: Any, llama: Path, tmp_path: Path
) -> None:
    make(llama, tmp_path / "artifact")
    damage(tmp_path / "artifact")
    base = load(llama)
    plain = logits(base)
    with pytest.raises(ArtifactCorruptError):
        METHOD.load(base, tmp_path / "artifact")
    assert torch.equal(logits(base), plain)


def test_the_bottlenecks_of_another_base_are_refused(llama: Path, tmp_path: Path) -> None:
    make(llama, tmp_path / "artifact")
    other = build_shape(tmp_path / "gpt2", "gpt2")
    with pytest.raises(ArtifactCorruptError):
        METHOD.load(load(other), tmp_path / "artifact")
