"""The optional accelerator for x86 processors: compiled kernels, fused training of Llama-shaped models.

It registers itself by entry points; nothing else in the project imports it. Without numba it refuses.
"""
