"""A short job: from upload to the tuned model's first token, beside a peer's script from start to adapter.

Ours goes through a running `luthier up` by HTTP, as a client sees it: upload, create, prepare, train,
publish, first token. The peer's script gets its rows tokenised already, and need not serve.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.machine import StolenTime
from benchmarks.results_file import ResultsFile, fingerprint_of, job_digest
from benchmarks.train.contestants import Order, run_peer, saving_to
from benchmarks.train.pairs import choose_variant, median_interval
from benchmarks.train.rows import ROWS, SHORT_JOB, SHORT_JOB_BAR, Row, Variant
from benchmarks.train.workload import Workload, learning_rates, make_spec, write_start
from luthier.client import LuthierClient
from luthier.core.errors import LuthierError

if TYPE_CHECKING:
    from openai import OpenAI

_MEASURING_SECONDS = 180.0


class JobFailedError(Exception):
    """Our job did not succeed."""


def measure_short_job(
    data: Path, workload: Workload, results: ResultsFile, scratch: Path, *, num_pairs: int
) -> dict[str, Any]:
    """Measure the row, going on where an earlier try stopped.

    Args:
        data: the chat file that the workload's rows are from.
        workload: the rows as the peer gets them.
        results: where every run is stored at once.
        scratch: an empty folder.
        num_pairs: pairs to have in the end.

    Returns:
        The row's results with its `summary`.
    """
    row = ROWS["lora-trl"]
    print(f"\nShort job of {workload.rows.num_rows} rows beside a TRL script ({SHORT_JOB})", flush=True)
    code = job_digest()
    found = results.row(SHORT_JOB, fingerprint_of(asdict(row), workload.digest, code), code)
    found["workload"] = workload.describe()
    spec = make_spec(workload, row.tuning)
    start = write_start(workload, spec, scratch / "start")

    def run(variant: Variant) -> dict[str, Any]:
        order = Order(
            row.environment,
            row.script,
            variant.options,
            spec.tuning,
            workload,
            start,
            learning_rates(spec, workload.num_steps),
            workload.device,
        )
        reported = run_peer(saving_to(order, scratch / "adapter"), scratch)
        shutil.rmtree(scratch / "adapter")
        return reported

    best = _known_best(row, results) or choose_variant(row, workload.device, found, results, run)
    if best is None:
        return found
    pairs: list[dict[str, Any]] = found.setdefault("pairs", [])
    lines = data.read_bytes().splitlines(keepends=True)
    upload = b"".join(lines[int(line) - 1] for line in workload.rows.lines)
    with _service() as client:
        # The first chat loads the base in the inference server, which a service in use has long done.
        _first_token(client, workload.facts.id)
        _let_measure(client, upload, workload)
        while len(pairs) < num_pairs:
            stolen = StolenTime()
            pair: dict[str, Any] = {}
            for who in ("ours", "peer") if len(pairs) % 2 == 0 else ("peer", "ours"):
                pair[who] = _run_job(client, upload, workload, row.tuning) if who == "ours" else run(best)
            pair["stolen_share"] = stolen.share()
            pair["ratio"] = pair["peer"]["total_seconds"] / pair["ours"]["total_seconds"]
            pairs.append(pair)
            found["summary"] = _summarise(pairs, best)
            results.save()
            print(
                f"  pair {len(pairs)}: ours {pair['ours']['total_seconds']:.1f} s, peer "
                f"{pair['peer']['total_seconds']:.1f} s: {pair['ratio']:.2f} times",
                flush=True,
            )
    return found


def _known_best(row: Row, results: ResultsFile) -> Variant | None:
    """Return the peer's fastest setting as its own row found it, or None when that was not measured here."""
    name = results.content["rows"].get(row.name, {}).get("best_variant")
    return next((variant for variant in row.variants if variant.name == name), None)


def _summarise(pairs: list[dict[str, Any]], best: Variant) -> dict[str, Any]:
    ratio = median_interval([pair["ratio"] for pair in pairs])
    return {
        "num_pairs": len(pairs),
        "peer_variant": best.name,
        "total_seconds": {
            who: median_interval([pair[who]["total_seconds"] for pair in pairs]).median
            for who in ("ours", "peer")
        },
        "ratio": asdict(ratio),
        "bar": SHORT_JOB_BAR,
        "is_above_bar": ratio.low >= SHORT_JOB_BAR,
    }


@contextmanager
def _service() -> Iterator["OpenAI"]:
    """Run a service of our own for the length of the block."""
    from openai import OpenAI

    from examples.local_service import free_port, make_fresh_home, running_service

    with tempfile.TemporaryDirectory(prefix="luthier-bench-") as folder:
        home = Path(folder) / "home"
        make_fresh_home(home)
        try:
            with running_service(home, free_port()) as service:
                yield OpenAI(base_url=service.base_url, api_key=service.api_key, max_retries=0, timeout=600)
        finally:
            # Removes its database too, which as root is elsewhere.
            make_fresh_home(home)


def _let_measure(client: "OpenAI", upload: bytes, workload: Workload) -> None:
    """Wait until the worker has measured this machine, which it does once, when no job runs."""
    file = client.files.create(file=("rows.jsonl", upload), purpose="fine-tune")
    body: dict[str, Any] = {"model": workload.facts.id, "training_file": file.id}
    deadline = time.monotonic() + _MEASURING_SECONDS
    for precision in ("auto", "float32"):
        body["training"] = {"precision": precision}
        while True:
            reported: Any = client.post("/fine_tuning/jobs/estimate", body=body, cast_to=object)
            if reported["seconds"] is not None:
                break
            if time.monotonic() > deadline:
                raise JobFailedError(f"the service has not measured this machine: {reported['reason']}")
            time.sleep(1.0)


def _run_job(client: "OpenAI", upload: bytes, workload: Workload, tuning: dict[str, Any]) -> dict[str, Any]:
    """Submit a job and wait for the first token of its model."""
    from openai import OpenAIError

    try:
        return _submit_and_wait(client, upload, workload, tuning)
    except (OpenAIError, LuthierError) as error:
        raise JobFailedError(f"{type(error).__name__}: {error}") from error


def _submit_and_wait(
    client: "OpenAI", upload: bytes, workload: Workload, tuning: dict[str, Any]
) -> dict[str, Any]:
    begin = time.perf_counter()
    file = client.files.create(file=("rows.jsonl", upload), purpose="fine-tune")
    uploaded = time.perf_counter()
    job = client.fine_tuning.jobs.create(
        model=workload.facts.id,
        training_file=file.id,
        seed=workload.seed,
        hyperparameters={"n_epochs": 1, "batch_size": workload.batch_size},
        extra_body={"tuning": tuning},
    )
    # By an event: polling would take a share of the processors.
    with LuthierClient(str(client.base_url), client.api_key) as follower:
        for _ in follower.follow_events(job.id):
            pass
    job = client.fine_tuning.jobs.retrieve(job.id)
    ended = time.perf_counter()
    if job.fine_tuned_model is None:
        raise JobFailedError(f"our job {job.status}: {json.dumps(job.error and job.error.to_dict())}")
    _first_token(client, job.fine_tuned_model)
    return {
        "total_seconds": time.perf_counter() - begin,
        "upload_seconds": uploaded - begin,
        "job_seconds": ended - uploaded,
        "first_token_seconds": time.perf_counter() - ended,
        "trained_tokens": job.trained_tokens,
    }


def _first_token(client: "OpenAI", model: str) -> None:
    client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": "Hello"}], max_tokens=1, temperature=0
    )
