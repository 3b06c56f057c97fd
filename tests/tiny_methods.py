"""What the methods' conformance suite works with: every method that is discovered, in every variant that its
schema names, on every tiny base. A new method or a new choice of an old one is tested by existing.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from luthier.bases.catalogue import FACTS_NAME
from luthier.core.errors import UnsupportedValueError
from luthier.core.specs import BaseFacts
from luthier.data.prepare.prepared_rows import PreparedRows
from luthier.methods import Attached, Method, MethodParams, Start, Workload, discover
from luthier.methods._tuning import check_tuning, parse_tuning
from luthier.modeling.load import load_base
from luthier.modeling.training_protocols import Batch
from luthier.training.loop.gradient_accumulation import StepScores, apply_gradients, compute_gradients
from luthier.training.model.batches import collate
from luthier.training.model.optimizer import build_optimizer
from luthier.training.model.training_model import JobModel
from tests.tiny import build_tiny_rows
from tests.tiny_shapes import SHAPES, facts_of

METHODS = sorted(discover())
ROWS = build_tiny_rows(8)
LLAMA = "llama"

# A choice that needs another parameter beside it.
_COMPANIONS: dict[tuple[str, str, Any], dict[str, Any]] = {
    (name, "init", "text"): {"init_text": "what is the colour of the sky?"} for name in ("prefix", "prompt")
}
# Free text that no schema lists.
_EXTRAS: dict[str, list[dict[str, Any]]] = {
    "lora": [{"target_modules": "attention"}, {"target_modules": "mlp", "use_rslora": True}],
    "prefix": [{"projection": True, "init": "random", "projection_dim": 8}],
    "full": [{"freeze": ".*embed.*|.*wte.*"}],
}


@dataclass(frozen=True)
class Case:
    """A method with its parameters on a tiny base."""

    shape: str
    tuning: dict[str, Any]

    def __str__(self) -> str:
        settings = [
            str(value) if isinstance(value, str) else f"{field}={value}"
            for field, value in self.tuning.items()
            if field != "init_text"
        ]
        return "-".join([self.shape, *settings])

    @property
    def base_id(self) -> str:
        """The id that an artifact names its base by."""
        return facts_of(self.shape).id

    def settle(self) -> tuple[Method, MethodParams]:
        """Return the method and its parameters without "auto"."""
        method, params = parse_tuning(check_tuning(self.tuning))
        workload = Workload(facts_of(self.shape), num_rows=ROWS.num_rows, num_tokens=ROWS.num_tokens)
        return method, method.resolve(params, workload)


def variants(name: str) -> list[dict[str, Any]]:
    """Return a method's `tuning` objects: the default, one per choice and switch, and the extras.

    What this machine can't do is left out here and is in `unsupported`.
    """
    return [tuning for tuning in _all_variants(name) if _is_supported(tuning)]


def unsupported(name: str) -> list[dict[str, Any]]:
    """Return the `tuning` objects that a method's schema allows and this machine refuses."""
    return [tuning for tuning in _all_variants(name) if not _is_supported(tuning)]


def _is_supported(tuning: dict[str, Any]) -> bool:
    try:
        check_tuning(tuning)
    except UnsupportedValueError:
        return False
    return True


def _all_variants(name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = [{"type": name}]
    properties = discover()[name].Params.model_json_schema()["properties"]
    for field, schema in properties.items():
        for value in _choices(schema):
            if field != "type" and value not in (schema.get("default"), "auto"):
                found.append({"type": name, field: value, **_COMPANIONS.get((name, field, value), {})})
    return found + [{"type": name, **extra} for extra in _EXTRAS.get(name, [])]


def _choices(schema: dict[str, Any]) -> Iterable[Any]:
    if "anyOf" in schema:
        return [value for branch in schema["anyOf"] for value in _choices(branch)]
    if schema.get("type") == "boolean":
        return [True, False]
    return schema.get("enum", [schema["const"]] if "const" in schema else [])


DEFAULTS = [Case(shape, {"type": name}) for name in METHODS for shape in SHAPES]
VARIANTS = [Case(LLAMA, tuning) for name in METHODS for tuning in variants(name)]
# Every method on every shape, and every variant on one of them.
CASES = DEFAULTS + [case for case in VARIANTS if case not in DEFAULTS]


class Bench:
    """The tiny bases on disk, a folder a shape, and what is done with them."""

    def __init__(self, bases: dict[str, Path]) -> None:
        self.bases = bases
        self._digests = {shape: self._digest(shape) for shape in bases}

    def is_untouched(self, shape: str) -> bool:
        return self._digest(shape) == self._digests[shape]

    def _digest(self, shape: str) -> str:
        files = sorted(path for path in self.bases[shape].iterdir() if path.is_file())
        return hashlib.sha256(b"".join(path.name.encode() + path.read_bytes() for path in files)).hexdigest()

    def load(self, shape: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
        return load_base(self.bases[shape], dtype=dtype, device="cpu")

    def start(self, case: Case, seed: int = 5) -> Start:
        """Return a start with the base's own tokenizer and the training rows."""
        tokenizer = Tokenizer.from_file(str(self.bases[case.shape] / "tokenizer.json"))
        return Start(
            seed=seed,
            base_id=case.base_id,
            tokenize=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
            examples=rows_of(ROWS),
        )

    def attach(
        self, case: Case, *, dtype: torch.dtype = torch.float32, seed: int = 5
    ) -> tuple[Method, Attached]:
        method, params = case.settle()
        attached = method.attach(self.load(case.shape, dtype), params, self.start(case, seed))
        attached.model.eval()
        return method, attached

    def job_model(self, case: Case, *, dtype: torch.dtype = torch.float32) -> JobModel:
        """Put a case's method on its base and make it ready for training."""
        method, attached = self.attach(case, dtype=dtype)
        return JobModel(method, attached, "cpu", batch(0))

    def trained(self, case: Case, num_steps: int = 3) -> JobModel:
        job_model = self.job_model(case)
        train(job_model, case, num_steps)
        return job_model


def make_job_model(
    base: Path, tuning: dict[str, Any], *, sample: Batch, dtype: torch.dtype = torch.float32
) -> JobModel:
    """Put a method on the tiny base in a folder, ready for training."""
    method, params = parse_tuning(check_tuning(tuning))
    facts = BaseFacts.model_validate_json((base / FACTS_NAME).read_bytes())
    resolved = method.resolve(params, Workload(facts, num_rows=8, num_tokens=200))
    start = Start(5, facts.id, tokenize=lambda _text: [7], examples=[[5, 6, 7]])
    attached = method.attach(load_base(base, dtype=dtype, device="cpu"), resolved, start)
    return JobModel(method, attached, "cpu", sample)


def rows_of(rows: PreparedRows) -> list[list[int]]:
    return [rows.row(index)[0].tolist() for index in range(rows.num_rows)]


def batch(*numbers: int) -> Batch:
    """Return rows of the training data, padded on the right."""
    return collate(ROWS, np.array(numbers), pad_id=2)


def everything() -> Batch:
    return batch(*range(ROWS.num_rows))


def step(
    job_model: JobModel, optimizer: torch.optim.Optimizer, parts: list[Batch], *, learning_rate: float
) -> StepScores:
    num_supervised = sum(int(part.supervised_BT.sum()) for part in parts)
    scores = compute_gradients(job_model, parts, num_supervised=num_supervised)
    apply_gradients(job_model, optimizer, scores, learning_rate=learning_rate, max_grad_norm=1.0)
    return scores


def train(job_model: JobModel, case: Case, num_steps: int) -> list[float]:
    """Train on all rows at the method's own rate and return the losses before every step."""
    method, params = case.settle()
    rate = method.base_learning_rate(params, base=facts_of(case.shape))
    optimizer = build_optimizer(job_model.parameters, learning_rate=rate, weight_decay=0.0, device="cpu")
    job_model.attached.model.train()
    losses = [step(job_model, optimizer, [everything()], learning_rate=rate).loss for _ in range(num_steps)]
    job_model.attached.model.eval()
    return losses


def digest(tensors: Iterable[torch.Tensor]) -> str:
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.detach().flatten().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
