"""What the processor has, by the features that kernels are compiled for: their code is kept under these."""

import numba
from numba.core.codegen import get_host_cpu_features


def has_feature(name: str) -> bool:
    """Whether kernels are compiled for a processor that has something, by LLVM's name for it.

    Not what the processor has: numba may be told to leave it out, and the compiler then dies of it.
    """
    asked = numba.config.CPU_FEATURES
    features: str = get_host_cpu_features() if asked is None else asked
    return f"+{name}" in features.split(",")


# Whether products of pairs of bfloat16 can be made here, and 16 numbers be rounded to it at once.
HAS_PAIRS = has_feature("avx512bf16")
# Whether there is a matrix unit (Intel AMX), which oneDNN's products use.
HAS_UNIT = has_feature("amx-tile") and has_feature("amx-bf16")
