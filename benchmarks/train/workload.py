"""The rows that both sides train on, tokenised once, in the order of our steps; and the first adapter."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from luthier.bases.catalogue import base_folder, find_base_facts
from luthier.core.settings import Settings
from luthier.core.specs import BaseFacts, Hyperparameters, Precision, TrainingOptions, TrainingSpec
from luthier.data.prepare.preparation import prepare_rows
from luthier.data.prepare.prepared_rows import PreparedRows
from luthier.methods._tuning import check_tuning, parse_tuning, resolve_spec

MAX_LENGTH = 1024


@dataclass(frozen=True)
class Workload:
    """Rows of one measurement and what they are trained with.

    `rows` are as our training process gets them; `peer_file` (.npz) holds the same rows in the order of our
    steps, so that a peer that reads it from the front to the end sees our batches.
    """

    rows: PreparedRows
    facts: BaseFacts
    base_folder: Path
    batch_size: int
    seed: int
    num_threads: int
    device: str
    peer_file: Path

    @property
    def num_steps(self) -> int:
        """Steps of the one epoch."""
        return -(-self.rows.num_rows // self.batch_size)

    @property
    def num_supervised_tokens(self) -> int:
        """Tokens that are predicted: a row's first token never is."""
        return int(self.rows.supervised.sum()) - int(self.rows.supervised[self.rows.offsets[:-1]].sum())

    @property
    def num_computed_tokens(self) -> int:
        """Tokens with their padding that our fast path runs."""
        return sum(self.computed_tokens_of_steps())

    def computed_tokens_of_steps(self) -> list[int]:
        """Return the tokens that our fast path runs in every step in one part: what rows share once."""
        from luthier.data.prepare.batch_plan import make_plan
        from luthier.training.model.batches import collate

        plan = make_plan(self.rows.lengths, batch_size=self.batch_size, num_epochs=1, seed=self.seed)
        batches = [collate(self.rows, rows, 0) for rows in plan.steps]
        return [
            batch.num_shared + len(batch.token_ids_BT) * (batch.num_needed - batch.num_shared)
            for batch in batches
        ]

    @property
    def digest(self) -> str:
        """Names rows, batch and seed."""
        content = self.rows.tokens.tobytes() + self.rows.supervised.tobytes() + self.rows.offsets.tobytes()
        settings = f"{self.batch_size} {self.seed} {self.num_threads} {self.device} {self.facts.digest}"
        return hashlib.sha256(content + settings.encode()).hexdigest()[:16]

    def describe(self) -> dict[str, Any]:
        """Return what the results say about the rows."""
        return {
            "base": self.facts.id,
            "rows": self.rows.num_rows,
            "tokens": self.rows.num_tokens,
            "computed_tokens": self.num_computed_tokens,
            "supervised_tokens": self.num_supervised_tokens,
            "mean_tokens": round(self.rows.num_tokens / self.rows.num_rows, 1),
            "longest_tokens": int(self.rows.lengths.max()),
            "batch_size": self.batch_size,
            "num_threads": self.num_threads,
            "device": self.device,
            "digest": self.digest,
        }


def load_rows(path: Path, base_folder: Path, *, num_rows: int, batch_size: int) -> PreparedRows:
    """Tokenise the first rows of a chat file with our mask, whole batches only; repeat them when too few.

    Args:
        path: a chat file.
        base_folder: for template and tokenizer.
        num_rows: how many are wanted; rounded down to whole batches, so that all batches are of one size.
        batch_size: rows of a step.

    Returns:
        The rows.
    """
    rows, _ = prepare_rows(path, base_folder, max_length=MAX_LENGTH, too_long="drop", purpose="training")
    whole = num_rows // batch_size * batch_size
    if whole == 0:
        raise SystemExit(f"--rows must be at least {batch_size}, one batch.")
    return rows.select([index % rows.num_rows for index in range(whole)])


def make_workload(
    rows: PreparedRows,
    facts: BaseFacts,
    base_folder: Path,
    *,
    batch_size: int,
    seed: int,
    num_threads: int,
    device: str,
    scratch: Path,
) -> Workload:
    """Lay the rows in the order of our steps and write them where peers read them.

    Args:
        rows: whole batches.
        facts: of the base.
        base_folder: the fetched base.
        batch_size: rows of a step.
        seed: decides the order.
        num_threads: CPU threads of both sides.
        device: cpu or cuda.
        scratch: an existing folder.

    Returns:
        The workload.
    """
    from luthier.data.prepare.batch_plan import make_plan

    plan = make_plan(rows.lengths, batch_size=batch_size, num_epochs=1, seed=seed)
    ordered = rows.select(np.concatenate(plan.steps).tolist())
    peer_file = scratch / "rows.npz"
    np.savez(peer_file, tokens=ordered.tokens, supervised=ordered.supervised, offsets=ordered.offsets)
    return Workload(rows, facts, base_folder, batch_size, seed, num_threads, device, peer_file)


def make_spec(
    workload: Workload, tuning: dict[str, Any], *, num_epochs: int = 1, precision: Precision = "auto"
) -> TrainingSpec:
    """Return the resolved spec of our run: the method's own rate, no validation rows, no save points.

    Args:
        workload: the rows.
        tuning: the method and its parameters.
        num_epochs: passes over the rows.
        precision: of the weights at rest.

    Returns:
        The spec, without "auto".
    """
    spec = TrainingSpec(
        base_id=workload.facts.id,
        tuning=check_tuning(tuning),
        hyperparameters=Hyperparameters(n_epochs=num_epochs, batch_size=workload.batch_size),
        training=TrainingOptions(save_every_steps=1_000_000, precision=precision),
        seed=workload.seed,
    )
    return resolve_spec(
        spec,
        base=workload.facts,
        num_rows=workload.rows.num_rows,
        num_tokens=workload.rows.num_tokens,
        num_threads=workload.num_threads,
    )


def find_base(base_id: str | None = None) -> tuple[BaseFacts, Path]:
    """Return the facts and the folder of a fetched base, the preloaded one when none is named; else end."""
    settings = Settings()
    base_id = base_id or settings.preload_base
    facts = find_base_facts(settings.bases_dir, base_id)
    if facts is None:
        raise SystemExit(f"Fetch the base first: luthier bases fetch {base_id}")
    return facts, base_folder(settings.bases_dir, facts.id).absolute()


def learning_rates(spec: TrainingSpec, num_steps: int) -> list[float]:
    """Return the rate of every step of our run, for the peer to follow."""
    from luthier.training.model.optimizer import learning_rate_at

    peak = spec.training.learning_rate
    assert peak is not None, "a resolved spec has a rate"
    warmup_ratio = spec.training.warmup_ratio
    return [
        learning_rate_at(step, num_steps=num_steps, peak=peak, warmup_ratio=warmup_ratio)
        for step in range(1, num_steps + 1)
    ]


def write_start(workload: Workload, spec: TrainingSpec, folder: Path) -> Path | None:
    """Save the adapter that our run starts from in PEFT's layout: the peer starts from the same numbers.

    Args:
        workload: names the base.
        spec: resolved.
        folder: made here.

    Returns:
        The folder; None for methods that PEFT has no layout for.
    """
    from luthier.methods.base import Start
    from luthier.modeling.load import load_base
    from luthier.training.model.device import choose_machine

    method, params = parse_tuning(spec.tuning)
    if method.name not in ("lora", "prefix", "prompt"):
        return None
    machine = choose_machine(workload.device, spec.training.precision, workload.num_threads)
    causal_lm = load_base(workload.base_folder, dtype=machine.dtype, device="cpu")
    start = Start(seed=spec.seed, base_id=spec.base_id, tokenize=_no_text)
    attached = method.attach(causal_lm, params, start)
    folder.mkdir(parents=True, exist_ok=True)
    method.save(attached, folder)
    return folder


def _no_text(_text: str) -> list[int]:
    raise SystemExit("The benchmark's rows start from random numbers; none needs a text.")
