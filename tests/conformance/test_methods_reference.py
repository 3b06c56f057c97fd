"""One training step in float32 equals one made of plain PyTorch, transformers and PEFT, written here.

The references share no code with ours: PEFT's layers and forward, or hooks with the formula; then
F.cross_entropy and AdamW. A new method brings its own.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel

from luthier.methods import Attached
from luthier.training.model.optimizer import build_optimizer
from tests.tiny_methods import CASES, METHODS, Bench, Case, batch, everything, step

Parameters = dict[str, torch.Tensor]
# Token ids in, logits out, and the parameters that they depend on, by the names that ours have.
Reference = tuple[Callable[[torch.Tensor], torch.Tensor], Parameters]


def lora(base: PreTrainedModel, case: Case, attached: Attached, saved: Path) -> Reference:
    """PEFT itself continues from what was saved."""
    model = PeftModel.from_pretrained(base, str(saved), is_trainable=True).train()
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return lambda ids: model(input_ids=ids).logits, trained


def full(base: PreTrainedModel, case: Case, attached: Attached, saved: Path) -> Reference:
    """Transformers' own model."""
    names = {name for name, _ in attached.named_trained_parameters()}
    for name, value in base.named_parameters():
        value.requires_grad_(name in names)
    trained = {name: value for name, value in base.named_parameters() if value.requires_grad}
    return lambda ids: base.train()(input_ids=ids).logits, trained


def prompt(base: PreTrainedModel, case: Case, attached: Attached, saved: Path) -> Reference:
    """PEFT's encoder and forward, from the same vectors."""
    start = attached.model.prompt_encoder["default"].embedding.weight
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=len(start))
    model = get_peft_model(base, config).train()
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(start)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return lambda ids: model(input_ids=ids).logits[:, len(start) :], trained


def prefix(base: PreTrainedModel, case: Case, attached: Attached, saved: Path) -> Reference:
    """PEFT's encoder and forward, from the same numbers; its projection where ours has one."""
    ours = attached.model.prompt_encoder["default"]
    is_projected = bool(case.tuning.get("projection"))
    config = PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=len(ours.embedding.weight),
        prefix_projection=is_projected,
        encoder_hidden_size=ours.transform[0].out_features if is_projected else None,
    )
    model = get_peft_model(base, config).train()
    theirs = model.prompt_encoder["default"]
    theirs.load_state_dict(ours.state_dict(), strict=True)
    if is_projected:
        # PEFT's projection knows no start: what ours adds to it is added here.
        theirs.register_forward_hook(lambda module, args, result: result + ours.start_NF)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return lambda ids: model(input_ids=ids).logits, trained


def adapter(base: PreTrainedModel, case: Case, attached: Attached, saved: Path) -> Reference:
    """The formula, hooked on the halves of every block."""
    config = json.loads((saved / "adapter_config.json").read_text())
    activation = {
        "gelu": functional.gelu,
        "relu": functional.relu,
        "silu": functional.silu,
        "tanh": torch.tanh,
    }[config["activation"]]
    trained = {
        name: value.detach().clone().requires_grad_() for name, value in attached.named_trained_parameters()
    }

    def add(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> Any:
        half = result[0] if isinstance(result, tuple) else result
        x = half
        if config["placement"] == "parallel":
            x = args[0] if args else kwargs["hidden_states"]
        down = functional.linear(x, trained[f"{name}.down.weight"], trained[f"{name}.down.bias"])
        up = functional.linear(activation(down), trained[f"{name}.up.weight"], trained[f"{name}.up.bias"])
        return (half + up, *result[1:]) if isinstance(result, tuple) else half + up

    attention, feed_forward = {
        "gemma3": ("post_attention_layernorm", "post_feedforward_layernorm"),
        "gpt2": ("attn", "mlp"),
    }.get(case.shape, ("self_attn", "mlp"))
    ends = {"attention_bottleneck": attention, "feed_forward_bottleneck": feed_forward}
    for name in {path.rsplit(".", 2)[0] for path in trained}:
        block, _, end = name.rpartition(".")
        module = base.get_submodule(f"{block}.{ends[end]}")
        module.register_forward_hook(
            lambda _, args, kwargs, result, name=name: add(name, args, kwargs, result), with_kwargs=True
        )
    return lambda ids: base(input_ids=ids).logits, trained


REFERENCES = {"adapter": adapter, "full": full, "lora": lora, "prefix": prefix, "prompt": prompt}


def test_every_method_has_a_reference() -> None:
    assert set(REFERENCES) >= set(METHODS)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_step_equals_the_plain_one(bench: Bench, tmp_path: Path, case: Case) -> None:
    job_model = bench.job_model(case)
    job_model.method.save(job_model.attached, tmp_path)
    base = AutoModelForCausalLM.from_pretrained(bench.bases[case.shape]).requires_grad_(False)
    run, expected = REFERENCES[job_model.method.name](base, case, job_model.attached, tmp_path)
    rows = everything()
    targets = rows.token_ids_BT.masked_fill(~rows.supervised_BT, -100)[:, 1:]
    logits = run(rows.token_ids_BT)[:, :-1]
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(expected.values(), 1.0)
    torch.optim.AdamW(expected.values(), lr=1e-2, weight_decay=0.1, foreach=False).step()

    job_model.attached.model.train()
    optimizer = build_optimizer(job_model.parameters, learning_rate=1e-2, weight_decay=0.1, device="cpu")
    # In three parts: cutting the batch must not show.
    parts = [batch(0, 1, 2), batch(3, 4, 5), batch(6, 7)]
    scores = step(job_model, optimizer, parts, learning_rate=1e-2)
    assert scores.loss == pytest.approx(loss.item(), rel=1e-5)
    assert scores.grad_norm == pytest.approx(norm.item(), rel=1e-4)
    found = dict(job_model.named_parameters)
    assert set(found) == set(expected)
    num_compared = 0
    for name, value in found.items():
        gradient = expected[name].grad
        # Adam's first step is rate * sign: a gradient near its rounding may step either way.
        is_sure = gradient.abs() > 1e-5
        assert (value.detach() - expected[name].detach())[is_sure].abs().sum() < 1e-6 * is_sure.numel(), name
        num_compared += int(is_sure.sum())
    assert num_compared > 0.1 * sum(value.numel() for value in found.values())
