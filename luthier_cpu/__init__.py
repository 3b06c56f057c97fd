"""The optional accelerator for x86 processors: compiled kernels for Llama-shaped models.

It registers itself by entry points; nothing else in the project imports it.
"""

import platform
from importlib.util import find_spec


def refusal(device: str) -> str | None:
    """Return why nothing here runs on a device, None when it does; the extra `cpu` installs numba."""
    if device not in ("cpu", "meta"):
        return "Its kernels run on the CPU."
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "Its kernels are for x86 processors."
    return None if find_spec("numba") else "numba is not installed (extra `cpu`)."
