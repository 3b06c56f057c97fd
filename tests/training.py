"""What tests let a worker do."""

from worker.context import WorkerContext
from worker.tasks.train import claim, train


def train_next(context: WorkerContext) -> bool:
    """Claim the oldest queued job and run it to an end; return whether there was one."""
    claimed = claim(context)
    if claimed is None:
        return False
    train(context, claimed)
    return True
