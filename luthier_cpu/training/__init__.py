"""Fused training of Llama-shaped models on compiled kernels."""
