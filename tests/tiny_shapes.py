"""Random bases of every shape that the methods must work on, each built in well under a second.

What differs: grouped-query attention, tied and untied heads, biases, norms on queries and keys, sliding
windows, scaled embeddings, capped logits, learned positions, Conv1D layers. All have the tiny tokenizer.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.utils import logging

from luthier.core.specs import BaseFacts
from tests.tiny import VOCAB_SIZE, make_facts, write_tokenizer

NUM_POSITIONS = 128
HIDDEN_SIZE = 48
NUM_LAYERS = 2

_TOKENS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "vocab_size": VOCAB_SIZE}
_COMMON: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 80,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": NUM_POSITIONS,
    # Larger than usual: two layers of the usual size would hardly change their input.
    "initializer_range": 0.15,
}
# Shorter than the rows of tests.tiny, so that it matters.
_WINDOW = 24

SHAPES: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**_COMMON, tie_word_embeddings=True),
    "llama-untied": LlamaConfig(**{**_COMMON, "num_key_value_heads": 4}, tie_word_embeddings=False),
    "qwen2": Qwen2Config(**_COMMON, tie_word_embeddings=True),
    # Heads wider than their share of the hidden size.
    "qwen3": Qwen3Config(**_COMMON, head_dim=20, tie_word_embeddings=False),
    "mistral": MistralConfig(**_COMMON, sliding_window=_WINDOW, tie_word_embeddings=False),
    "gemma": GemmaConfig(**_COMMON, head_dim=12),
    "gemma3": Gemma3TextConfig(
        **_COMMON,
        head_dim=12,
        sliding_window=_WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        final_logit_softcapping=5.0,
    ),
    "gpt2": GPT2Config(
        **_TOKENS,
        n_embd=HIDDEN_SIZE,
        n_layer=NUM_LAYERS,
        n_head=4,
        n_positions=NUM_POSITIONS,
        initializer_range=0.15,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
    ),
}

# Shapes that not every method works on, or that differ from those above for servers alone.
SERVED_SHAPES: dict[str, PreTrainedConfig] = {
    **{name: SHAPES[name] for name in ("qwen2", "qwen3", "gemma3", "mistral", "gpt2")},
    # Queries, keys and values of one layer, and gate and up.
    "phi3": Phi3Config(**_COMMON, sliding_window=_WINDOW, tie_word_embeddings=False),
    "qwen3-moe": Qwen3MoeConfig(
        **_COMMON, head_dim=12, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2
    ),
    # Soft caps of scores, and a window in every other layer.
    "gemma2": Gemma2Config(
        **_COMMON,
        head_dim=12,
        sliding_window=_WINDOW,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0,
    ),
    # Attention sinks, biases and experts.
    "gpt-oss": GptOssConfig(
        **_COMMON, head_dim=12, sliding_window=_WINDOW, num_local_experts=4, num_experts_per_tok=2
    ),
}


def build_shape(folder: Path, name: str, *, seed: int = 0) -> Path:
    """Write a random base of a shape, with what transformers loads a model and a tokenizer from."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config((SHAPES | SERVED_SHAPES)[name], dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                # Biases and norms start at 0 or 1, and then a fault in them would not show.
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def facts_of(name: str) -> BaseFacts:
    """Return the facts of a shape as a fetched base has them."""
    return make_facts(
        id=f"tiny-{name}",
        digest="sha256:" + "1" * 64,
        context_length=NUM_POSITIONS,
        num_parameters=100_000,
        num_layers=NUM_LAYERS,
        hidden_size=HIDDEN_SIZE,
    )
