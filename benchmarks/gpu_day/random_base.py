"""A random base of the 8B shape, or of a fraction of it, made on the device; and LoRA files for it."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from luthier.bases.catalogue import FACTS_NAME
from luthier.core.shapes import read_shape
from luthier.core.specs import BaseFacts
from tests.tiny import write_tokenizer

CONTEXT_LENGTH = 4096
# Token ids that the tokenizer, which is that of the tests, has a text for.
FIRST_TOKEN, NUM_TOKENS = 3, 256
_RANK, _ALPHA = 16, 32
_LORA_STD = 0.02


@dataclass(frozen=True)
class Scale:
    """Sizes of a Llama model, and of what is trained and served on it.

    `num_streams` sequences have `num_prompt_tokens` and get `num_new_tokens`; `num_steps` training steps of
    `batch_size` rows of at most `row_tokens` tokens.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    num_steps: int
    batch_size: int
    row_tokens: int
    num_prompt_tokens: int
    num_new_tokens: int
    num_streams: int = 16


# By what share of the 8B shape they are. 1 is Llama-3.1-8B; 4096 is for a test.
SCALES = {
    1: Scale(4096, 14336, 32, 32, 8, 128256, 12, 4, 1024, 128, 128),
    64: Scale(1024, 3584, 8, 8, 2, 8016, 3, 4, 64, 32, 16),
    4096: Scale(256, 896, 2, 4, 2, 501, 3, 4, 32, 8, 4),
}


def make_base(folder: Path, scale: Scale, device: str) -> BaseFacts:
    """Write a random base with the layout of a fetched one.

    Args:
        folder: made here, about two bytes a weight.
        scale: its sizes.
        device: where the weights are drawn.

    Returns:
        Its facts.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=scale.hidden_size,
        intermediate_size=scale.intermediate_size,
        num_hidden_layers=scale.num_layers,
        num_attention_heads=scale.num_heads,
        num_key_value_heads=scale.num_kv_heads,
        vocab_size=scale.vocab_size,
        max_position_embeddings=CONTEXT_LENGTH,
        rope_parameters={"rope_theta": 500000.0, "rope_type": "default"},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype="bfloat16",
    )
    torch.manual_seed(1)
    with torch.device(device):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    facts = BaseFacts(
        id=folder.name,
        source="path:/none",
        licence="apache-2.0",
        digest="sha256:" + f"{scale.hidden_size:064x}",
        tokenizer_digest="sha256:" + "a" * 64,
        context_length=CONTEXT_LENGTH,
        num_parameters=model.num_parameters(),
        num_layers=scale.num_layers,
        hidden_size=scale.hidden_size,
    )
    (folder / FACTS_NAME).write_text(facts.model_dump_json(indent=1))
    return facts


def lora_tuning() -> dict[str, Any]:
    """Return the `tuning` of the trained adapter and of the served ones: rank 16 on all linear layers."""
    return {"type": "lora", "rank": _RANK, "alpha": _ALPHA, "dropout": 0.0, "target_modules": "all-linear"}


def write_lora(folder: Path, base: Path, *, seed: int, device: str, is_start: bool = False) -> Path:
    """Write random LoRA weights in PEFT's layout.

    Args:
        folder: made here.
        base: the base's folder.
        seed: decides every number.
        device: where they are drawn.
        is_start: B is zero, as before the first step.
    """
    folder.mkdir(parents=True)
    generator = torch.Generator(device).manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    shapes = read_shape(base).linear_shapes
    for path, (num_inputs, num_outputs) in shapes.items():
        a_RK = torch.randn(_RANK, num_inputs, generator=generator, device=device) / math.sqrt(num_inputs)
        b_OR = torch.randn(num_outputs, _RANK, generator=generator, device=device) * _LORA_STD
        weights[f"base_model.model.{path}.lora_A.weight"] = a_RK.cpu()
        weights[f"base_model.model.{path}.lora_B.weight"] = (b_OR * (not is_start)).cpu()
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": _RANK,
        "lora_alpha": _ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({path.rpartition(".")[2] for path in shapes}),
        "inference_mode": not is_start,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1))
    return folder
