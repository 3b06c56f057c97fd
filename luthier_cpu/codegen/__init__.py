"""The compiler of kernels by numba, their launch on torch's threads, and what the processor has."""
