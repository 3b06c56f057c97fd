"""What adapters promise beyond what every method does: their places, their format, many on one base."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, OPTConfig

from luthier.core.errors import ArtifactCorruptError, InvalidValueError
from luthier.methods import Attached, Start, Workload
from luthier.methods._bottleneck import find_sites
from luthier.methods.adapter import LOADER, METHOD, AdapterParams
from tests.tiny import VOCAB_SIZE
from tests.tiny_methods import LLAMA, Bench
from tests.tiny_shapes import HIDDEN_SIZE, SHAPES, facts_of

ROOT = Path(__file__).parents[2]
PLACEMENTS = ["houlsby", "pfeiffer", "parallel"]
TOKENS_BT = torch.from_numpy(np.random.default_rng(0).integers(3, VOCAB_SIZE, (2, 30)))


def start(seed: int = 5) -> Start:
    return Start(seed, "tiny", tokenize=lambda _text: [])


def params(**fields: Any) -> AdapterParams:
    asked = AdapterParams(**{"bottleneck_dim": 7, **fields})
    return METHOD.resolve(asked, Workload(facts_of("llama"), num_rows=10, num_tokens=100))


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=TOKENS_BT, use_cache=False).logits


@torch.no_grad()
def learn(attached: Attached, seed: int = 0) -> None:
    """Give every trained weight a value, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in attached.named_trained_parameters():
        parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))


def make(bench: Bench, folder: Path, shape: str = LLAMA, seed: int = 0, **fields: Any) -> torch.Tensor:
    """Write an artifact; return the logits of the model that it was made from."""
    attached = METHOD.attach(bench.load(shape), params(**fields), start())
    learn(attached, seed)
    folder.mkdir(parents=True)
    METHOD.save(attached, folder)
    attached.model.eval()
    return logits(attached.model)


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_placements_work_on_every_shape(bench: Bench, shape: str, placement: str, tmp_path: Path) -> None:
    attached = METHOD.attach(bench.load(shape), params(placement=placement), start())
    expected = logits(bench.load(shape))
    assert torch.equal(logits(attached.model), expected)
    learn(attached)
    tuned = logits(attached.model)
    assert not torch.allclose(tuned, expected, atol=1e-2)
    METHOD.save(attached, tmp_path)
    assert torch.equal(logits(METHOD.load(bench.load(shape), tmp_path).model), tuned)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_each_placement_computes_what_its_paper_says(bench: Bench, placement: str) -> None:
    attached = METHOD.attach(bench.load(LLAMA), params(placement=placement, activation="tanh"), start())
    learn(attached)

    def update(bottleneck: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        middle = torch.tanh(x @ bottleneck.down.weight.T + bottleneck.down.bias)
        return middle @ bottleneck.up.weight.T + bottleneck.up.bias

    plain = bench.load(LLAMA)
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


def test_trained_weights_are_float32_on_a_bf16_base_and_the_result_is_bf16(bench: Bench) -> None:
    attached = METHOD.attach(bench.load(LLAMA, torch.bfloat16), params(), start())
    assert {value.dtype for _, value in attached.named_trained_parameters()} == {torch.float32}
    assert torch.equal(logits(attached.model), logits(bench.load(LLAMA, torch.bfloat16)))


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
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert [module.rpartition(".")[2] for module in find_sites(model, "houlsby").values()] == [
        "post_attention_layernorm",
        "post_feedforward_layernorm",
    ]
    assert [module.rpartition(".")[2] for module in find_sites(model, "parallel").values()] == ["mlp"]


def test_dropout_acts_in_training_alone(bench: Bench) -> None:
    attached = METHOD.attach(bench.load(LLAMA), params(dropout=0.5), start())
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


def test_a_bottleneck_wider_than_the_base_is_refused(bench: Bench) -> None:
    wide = AdapterParams(bottleneck_dim=HIDDEN_SIZE + 1, dropout=0.0)
    for attempt in (
        lambda: METHOD.attach(bench.load(LLAMA), wide, start()),
        lambda: params(bottleneck_dim=49),
    ):
        with pytest.raises(InvalidValueError, match="48") as caught:
            attempt()
        assert caught.value.param == "tuning.bottleneck_dim"


def documented_loader() -> str:
    text = (ROOT / "docs" / "adapter-format.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0]


@pytest.mark.parametrize("shape", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_the_documented_loader_gives_the_trained_logits(
    bench: Bench, shape: str, placement: str, tmp_path: Path
) -> None:
    expected = make(bench, tmp_path / "artifact", shape, placement=placement, activation="silu")
    scope: dict[str, Any] = {}
    exec(documented_loader(), scope)
    model = scope["load_adapter"](
        AutoModelForCausalLM.from_pretrained(bench.bases[shape]), tmp_path / "artifact"
    )
    assert torch.equal(logits(model), expected)


def test_the_card_and_the_document_hold_one_loader() -> None:
    assert documented_loader() == LOADER
    assert LOADER in METHOD.loading


def test_an_artifact_is_two_files_that_name_the_base_and_no_path(bench: Bench, tmp_path: Path) -> None:
    make(bench, tmp_path / "a", placement="pfeiffer")
    make(bench, tmp_path / "b", placement="pfeiffer")
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
    assert not METHOD.recognises(bench.bases[LLAMA])


Weights = dict[str, torch.Tensor]


def _change(change: Callable[[Weights], Weights]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "adapter_model.safetensors"
        save_file(change(load_file(path)), path)

    return damage


def _cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:200])


def _point_elsewhere(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace("model.layers.0.mlp", "lm_head"))


def _widen(weights: Weights) -> Weights:
    name = next(name for name in weights if name.endswith("down.weight"))
    return weights | {name: torch.zeros(7, HIDDEN_SIZE + 1)}


DAMAGES: dict[str, Callable[[Path], None]] = {
    "a tensor less": _change(lambda weights: dict(sorted(weights.items())[1:])),
    "a tensor more": _change(lambda weights: weights | {"more": torch.zeros(1)}),
    "a wider tensor": _change(_widen),
    "cut weights": _cut,
    "another module": _point_elsewhere,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_artifact_is_refused_and_the_base_is_kept(
    damage: str, bench: Bench, tmp_path: Path
) -> None:
    make(bench, tmp_path / "artifact")
    DAMAGES[damage](tmp_path / "artifact")
    base = bench.load(LLAMA)
    plain = logits(base)
    with pytest.raises(ArtifactCorruptError):
        METHOD.load(base, tmp_path / "artifact")
    assert torch.equal(logits(base), plain)


def test_the_bottlenecks_of_another_base_are_refused(bench: Bench, tmp_path: Path) -> None:
    make(bench, tmp_path / "artifact")
    with pytest.raises(ArtifactCorruptError):
        METHOD.load(bench.load("gpt2"), tmp_path / "artifact")
