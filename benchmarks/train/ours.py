"""One run of our training process, measured from outside: events, seconds, memory."""

import time
from pathlib import Path
from typing import Any

from benchmarks.train.workload import Workload
from luthier.core.events import FailedEvent, FinishedEvent, StartedEvent, StepEvent, parse_event
from luthier.core.specs import RunInputs, TrainingSpec
from luthier.data.prepare.prepared_rows import write_prepared
from worker.training_process.fork_server import ForkedRun, ForkServer

_IMPORT_SECONDS = 180.0
_IDLE_SECONDS = 3600.0


class OursFailedError(Exception):
    """Our own run failed; the message holds the end of its log."""


def run_ours(folder: Path, workload: Workload, spec: TrainingSpec) -> dict[str, Any]:
    """Train as the worker does: by a process with its imports done, which forks one for the run.

    Args:
        folder: the run directory, made here.
        workload: the rows.
        spec: resolved.

    Returns:
        `seconds` that the steps took (evaluations, checkpoints and proofs not counted, as peers make none),
        `wall_seconds` from the start to the last step's event, all in between counted, losses, tokens, memory
        above the process after its imports, and `path`: fused or plain.

    Raises:
        OursFailedError: when the run does not finish.
    """
    write_run_directory(folder, workload, spec)
    fork_server = ForkServer(_IDLE_SECONDS)
    fork_server.start()
    try:
        imports_bytes = _wait_for_imports(fork_server)
        run = fork_server.take(folder)
        if run is None:
            raise OursFailedError("the fork server ended before its run began")
        with run.stdout:
            reported = _follow(run)
    finally:
        fork_server.stop()
    peak_bytes = reported.pop("peak_bytes")
    return reported | {
        "memory_bytes": peak_bytes if workload.device == "cuda" else peak_bytes - imports_bytes,
        "load_bytes": max(0, reported["load_bytes"] - imports_bytes),
        "imports_bytes": imports_bytes,
    }


def write_run_directory(folder: Path, workload: Workload, spec: TrainingSpec) -> None:
    """Write what a training process reads."""
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(spec.model_dump_json())
    inputs = RunInputs(
        job_id="bench",
        model_name="bench",
        base_path=str(workload.base_folder),
        device="cuda" if workload.device == "cuda" else "cpu",
    )
    (folder / "inputs.json").write_text(inputs.model_dump_json())
    write_prepared(workload.rows, folder / "train.safetensors")


def _follow(run: ForkedRun) -> dict[str, Any]:
    """Read events until the run has ended."""
    begin = end = 0.0
    load_bytes = 0
    steps: list[StepEvent] = []
    for event in map(parse_event, run.stdout):
        if isinstance(event, StartedEvent):
            begin = time.perf_counter()
            load_bytes = _status_bytes(run.pid, "VmHWM")
        elif isinstance(event, StepEvent):
            end = time.perf_counter()
            steps.append(event)
        elif isinstance(event, FailedEvent):
            raise OursFailedError(f"{event.code}: {event.message}")
        elif isinstance(event, FinishedEvent):
            return {
                "seconds": event.report.seconds.train,
                "wall_seconds": end - begin,
                "phase_seconds": event.report.seconds.model_dump(),
                "losses": [step.metrics.train_loss for step in steps],
                "num_tokens": sum(step.num_tokens for step in steps),
                "num_supervised_tokens": sum(step.num_supervised_tokens for step in steps),
                "path": event.report.path,
                "precision": event.report.precision,
                "num_trained_parameters": event.num_trained_parameters,
                "versions": event.report.versions,
                "load_bytes": load_bytes,
                "peak_bytes": event.report.peak_memory_bytes,
            }
    raise OursFailedError(
        f"the training process ended early, exit code {run.wait()}; see child.log beside its rows"
    )


def _wait_for_imports(fork_server: ForkServer) -> int:
    """Wait until the fork server waits for a run: then its imports are done. Return its memory."""
    end = time.monotonic() + _IMPORT_SECONDS
    while time.monotonic() < end and fork_server.pid is not None:
        if _waits_for_message(fork_server.pid):
            return _status_bytes(fork_server.pid, "VmRSS")
        time.sleep(0.05)
    raise OursFailedError(f"the fork server did not wait for a run within {_IMPORT_SECONDS:.0f} s")


def _waits_for_message(pid: int) -> bool:
    """Whether the process is in poll: proc(5), /proc/PID/syscall; call 7 on x86-64, ppoll, 73, on Arm."""
    return Path(f"/proc/{pid}/syscall").read_text().split()[0] in ("7", "73")


def _status_bytes(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OursFailedError(f"/proc/{pid}/status has no {field}")
