"""`python -P -m luthier.training RUN_DIR [RUN_DIR …]`;
or `--forks IDLE_SECONDS`: imports done, a process for each run that is asked for (fork_server.py);
or `--measure-speed DEVICE NUM_THREADS`: the speed of a matrix product, for estimates.

Exit code 0: every run finished or was stopped; 1: one failed, after its `failed` event.
"""

import argparse
import gc
import os
import sys
from pathlib import Path

from luthier.core.runtime import keep_freed_memory
from luthier.training.process_io import StopRequest, take_stdout

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # oneDNN keeps a product's code, half a megabyte, for every number of rows: by default for the last 1,024
    # products. A step has about thirty of them, over and over; the next step has another number of rows.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
}


def main() -> int:
    """Run the directories that were named; return the exit code."""
    parser = argparse.ArgumentParser(prog="luthier.training", description=__doc__)
    parser.add_argument("run_directories", nargs="*", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--forks",
        type=float,
        metavar="IDLE_SECONDS",
        help="import, then fork a process for each run, until none came for so long",
    )
    parser.add_argument(
        "--measure-speed",
        nargs=2,
        metavar=("DEVICE", "NUM_THREADS"),
        help="print how fast matrix products are",
    )
    arguments = parser.parse_args()
    # Before anything slow: from here SIGTERM is handled, and stray prints can't break the event lines.
    stop = StopRequest().install()
    events = take_stdout()
    keep_freed_memory()
    os.environ |= _ENVIRONMENT

    if arguments.measure_speed:
        from luthier.training.model.device import measure_speed

        device, num_threads = arguments.measure_speed
        os.write(events, measure_speed(device, int(num_threads)).model_dump_json().encode())
        return 0

    # A process that waits for runs has nothing to save.
    stop.leave_at_once = arguments.forks is not None
    # What an import makes stays, and the collector would go through it again and again.
    gc.disable()
    from luthier.training.run import run

    if arguments.forks is not None:
        _import_all()
    gc.enable()
    if arguments.forks is not None:
        from luthier.training.fork_server import fork_runs

        return fork_runs(run, stop, arguments.forks)
    has_failed = False
    for folder in arguments.run_directories:
        if stop.is_set:
            break
        has_failed |= not run(folder, events, stop)
    return int(has_failed)


def _import_all() -> None:
    """Import what a run needs, accelerators with it, and touch no device but the CPU."""
    import peft
    import transformers

    from luthier.training.model.training_model import find_accelerators

    for accelerator in find_accelerators():
        accelerator.preload()
    _ = (peft.get_peft_model, peft.LoraConfig, transformers.AutoModelForCausalLM)
    # A collection in a run would write to these objects, and only unwritten pages are shared with a fork.
    gc.collect()
    gc.freeze()


if __name__ == "__main__":
    sys.exit(main())
