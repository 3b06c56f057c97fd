"""A random Llama so small that nothing in it takes time."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def small_llama(dtype: torch.dtype) -> LlamaForCausalLM:
    """Return one of two layers, the same each time."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).to(dtype).eval()
