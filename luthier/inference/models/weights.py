"""Loading a model's weights, one at a time in a process."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar, TypeVarTuple

import torch
from transformers import PreTrainedModel

from luthier.modeling.load import load_base

ArgumentsT = TypeVarTuple("ArgumentsT")
ResultT = TypeVar("ResultT")

# transformers changes torch itself while it builds a model, its initialisers and its default type. Of two
# threads that do so at once each may put the other's changes back, and no model can be loaded any more.
_ONE_AT_A_TIME = threading.Lock()
# Who waits for his turn holds no thread that others need.
_THREAD = ThreadPoolExecutor(
    1, thread_name_prefix="weights", initializer=torch.set_num_threads, initargs=(1,)
)


async def in_turn(work: Callable[[*ArgumentsT], ResultT], *arguments: *ArgumentsT) -> ResultT:
    """Run work that loads weights in the one thread for that, after all that was asked for before."""
    return await asyncio.get_running_loop().run_in_executor(_THREAD, work, *arguments)


def load_weights(
    folder: Path, *, dtype: torch.dtype, device: torch.device, refuse_extra: bool = False
) -> PreTrainedModel:
    """Load a causal language model as `load_base` does; any thread may call it.

    Args:
        device: where they are to lie.
        refuse_extra: also refuse tensors that the architecture has no place for.

    Returns:
        The model in evaluation mode.

    Raises:
        BaseUnavailableError: when the folder can't be read as a model, or lacks some of its tensors.
    """
    with _ONE_AT_A_TIME:
        return load_base(folder, dtype=dtype, device=str(device), refuse_extra=refuse_extra)


def available_bytes() -> int:
    """Return how much memory the machine has left; the kernel's word, which knows no limit of a container."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
