"""What tests let a worker do."""

from functools import cache

from luthier.core.settings import Settings
from tests.conftest import Api
from worker.app import sweep
from worker.context import WorkerContext, make_context
from worker.tasks.train import claim, train
from worker.training_process.fork_server import ForkServer


@cache
def fork_server() -> ForkServer:
    """Return what many tests' runs are forked from, so that each need not import torch and transformers."""
    return ForkServer(idle_seconds=3600)


def make_worker(settings: Settings, api: Api) -> WorkerContext:
    """Make a worker that is known to be alive; its notifications are noted beside the API's."""
    made = make_context(settings)
    made.notify = api.notified.append
    made.fork_server = fork_server()
    sweep(made)
    return made


def train_next(context: WorkerContext) -> bool:
    """Claim the oldest queued job and run it to an end; return whether there was one."""
    claimed = claim(context)
    if claimed is None:
        return False
    train(context, claimed)
    return True
