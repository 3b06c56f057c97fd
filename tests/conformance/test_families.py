"""What families of bases do that a shortcut could lose: capped logits, heads of their own, experts."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteMoeConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from luthier.core.errors import InvalidValueError
from luthier.core.shapes import read_shape
from luthier.methods import Attached, Start, Workload, discover
from luthier.methods._tuning import check_tuning, parse_tuning
from luthier.modeling.head_loss import gather_supervised
from luthier.modeling.load import load_base
from luthier.training.model.training_model import JobModel
from tests.tiny import VOCAB_SIZE
from tests.tiny_methods import batch, everything
from tests.tiny_shapes import facts_of

_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
    "pad_token_id": 2,
}
_EXPERTS = {
    "mixtral": MixtralConfig(**_SIZES, intermediate_size=80, num_local_experts=4),
    "qwen3-moe": Qwen3MoeConfig(
        **_SIZES, intermediate_size=80, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2
    ),
    "granite-moe": GraniteMoeConfig(**_SIZES, intermediate_size=80, num_local_experts=4),
}


def _save(config: PreTrainedConfig, folder: Path, scale: float = 1.0) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(scale)
    model.save_pretrained(folder)
    return folder


def _lora(target_modules: str) -> dict[str, object]:
    return {"type": "lora", "rank": 4, "target_modules": target_modules}


@torch.no_grad()
def test_capped_logits_are_trained_on_as_the_model_gives_them_in_bf16(tmp_path: Path) -> None:
    # Logits large enough for the cap to matter, and small enough for it to pass for rounding in bf16.
    config = Gemma2Config(**_SIZES, intermediate_size=80, final_logit_softcapping=30.0)
    base = load_base(_save(config, tmp_path, scale=20.0), dtype=torch.bfloat16, device="cpu")
    expected_model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    method = discover()["full"]
    job_model = JobModel(method, Attached(model=base, causal_lm=base), "cpu", batch(0))

    rows = everything()
    logits_NV, targets_N = gather_supervised(expected_model(rows.token_ids_BT).logits, rows)
    expected = functional.cross_entropy(logits_NV.float(), targets_N, reduction="sum")
    assert 10 < logits_NV.abs().max() < 30
    assert job_model.loss(rows).nll_sum.item() == pytest.approx(expected.item(), rel=5e-3)


@pytest.mark.parametrize("name", _EXPERTS)
@pytest.mark.parametrize("target_modules", ["all-linear", "mlp"])
def test_low_rank_updates_of_experts_are_refused(tmp_path: Path, name: str, target_modules: str) -> None:
    folder = _save(_EXPERTS[name], tmp_path)
    method, params = parse_tuning(check_tuning(_lora(target_modules)))
    refusals = []
    base = load_base(folder, dtype=torch.float32, device="cpu")
    for attempt in (
        lambda: method.cost(params, read_shape(folder)),
        lambda: method.attach(base, params, Start(seed=0, base_id="b", tokenize=lambda _: [])),
    ):
        with pytest.raises(InvalidValueError, match="experts") as caught:
            attempt()
        refusals.append((caught.value.param, caught.value.message))
    assert refusals[0] == refusals[1]
    assert refusals[0][0] == "tuning.target_modules"


@pytest.mark.parametrize("name", _EXPERTS)
def test_beside_experts_the_estimate_counts_what_is_trained(tmp_path: Path, name: str) -> None:
    folder = _save(_EXPERTS[name], tmp_path)
    method, params = parse_tuning(check_tuning(_lora("attention")))
    params = method.resolve(params, Workload(facts_of("llama"), num_rows=8, num_tokens=80))
    base = load_base(folder, dtype=torch.float32, device="cpu")
    attached = method.attach(base, params, Start(seed=0, base_id="b", tokenize=lambda _: []))
    assert method.cost(params, read_shape(folder)).num_parameters == attached.num_trained_parameters
    assert method.cost(params, read_shape(folder)).num_parameters == 2 * 4 * (4 * 48 + 48 + 24 + 48 + 24)
