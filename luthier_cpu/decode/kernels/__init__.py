"""Compiled kernels of a decode step."""
