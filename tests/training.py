"""What tests let a worker do."""

from functools import cache

from worker.context import WorkerContext
from worker.spare import WarmSpare
from worker.tasks.train import claim, train


@cache
def shared_spare() -> WarmSpare:
    """Return what many tests' runs are forked from, so that each need not import torch and transformers."""
    return WarmSpare(idle_seconds=3600)


def train_next(context: WorkerContext) -> bool:
    """Claim the oldest queued job and run it to an end; return whether there was one."""
    claimed = claim(context)
    if claimed is None:
        return False
    train(context, claimed)
    return True
