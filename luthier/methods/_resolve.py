"""Checking a request's `tuning` object, and replacing every "auto" of a spec by a number."""

from typing import Any

from pydantic import ValidationError

from luthier.core.errors import InvalidValueError, UnsupportedValueError
from luthier.core.specs import BaseFacts, DpoOptions, Hyperparameters, TrainingSpec
from luthier.methods._discover import discover
from luthier.methods._faults import first_fault
from luthier.methods.base import Method, MethodParams, Workload

MAX_EPOCHS = 50
MAX_BATCH_SIZE = 256
MAX_BETA = 2.0
# As in the experiments of the paper (arXiv:2305.18290, appendix B).
DEFAULT_BETA = 0.1
# A pair pulls at the difference of two answers, which a rate made for one answer overshoots. Measured on our
# preference set (benchmarks/preferences.py) with lora: at a tenth 76 % of held-out pairs after two epochs, at
# this 89 %.
_DPO_RATE_SHARE = 0.3


def check_tuning(tuning: dict[str, Any]) -> dict[str, Any]:
    """Check the `tuning` object of a request against the method that it names.

    Args:
        tuning: the object as it came; `{}` is LoRA with its defaults.

    Returns:
        The same with every default filled in and "auto" kept.

    Raises:
        InvalidRequestError: names the first offending field as `tuning.<field>`.
    """
    method = _method_of(tuning)
    return _parse(method, tuning).model_dump(mode="json")


def resolve_spec(
    spec: TrainingSpec,
    *,
    base: BaseFacts,
    num_rows: int,
    num_tokens: int,
    num_threads: int,
    memory_bytes: int | None = None,
) -> TrainingSpec:
    """Replace every "auto" by a number and record the base and the threads.

    Args:
        spec: the spec as the request made it.
        num_rows: training rows; pairs when the objective is dpo.
        num_tokens: tokens of those rows, one epoch.
        num_threads: CPU threads of every attempt.
        memory_bytes: memory of the training device, where it is known.

    Returns:
        A spec whose `is_resolved` is true and whose `training.learning_rate` is the peak rate.

    Raises:
        InvalidRequestError: when a value is out of range.
    """
    method = _method_of(spec.tuning)
    workload = Workload(base, num_rows, num_tokens, memory_bytes)
    params = method.resolve(_parse(method, spec.tuning), workload)
    asked = spec.hyperparameters
    passes = method.auto_passes * _auto_epochs(num_rows, num_tokens)
    epochs = passes if asked.n_epochs == "auto" else asked.n_epochs
    batch_size = _auto_batch_size(num_rows) if asked.batch_size == "auto" else asked.batch_size
    multiplier = 1.0 if asked.learning_rate_multiplier == "auto" else asked.learning_rate_multiplier
    _check_range("n_epochs", epochs, MAX_EPOCHS)
    _check_range("batch_size", batch_size, MAX_BATCH_SIZE)
    if not 0 < multiplier < float("inf"):
        raise InvalidValueError(
            "learning_rate_multiplier must be above 0.", param="hyperparameters.learning_rate_multiplier"
        )
    rate = spec.training.learning_rate
    if rate is None:
        share = 1.0 if spec.dpo is None else _DPO_RATE_SHARE
        rate = min(1.0, share * method.base_learning_rate(params, base=base) * multiplier)
    max_length = row_limit(spec, base)
    return spec.model_copy(
        update={
            "base": base,
            "tuning": params.model_dump(mode="json"),
            "hyperparameters": Hyperparameters(
                n_epochs=epochs, batch_size=batch_size, learning_rate_multiplier=multiplier
            ),
            "training": spec.training.model_copy(update={"learning_rate": rate, "max_length": max_length}),
            "dpo": None if spec.dpo is None else _resolve_dpo(spec.dpo),
            "num_threads": num_threads,
        }
    )


def row_limit(spec: TrainingSpec, base: BaseFacts) -> int:
    """Return the longest row of a job in tokens: what it asks for, within what virtual tokens leave it."""
    room = room_in_context(spec, base)
    return min(spec.training.max_length or room, room)


def room_in_context(spec: TrainingSpec, base: BaseFacts) -> int:
    """Return the tokens of the base's context that virtual tokens leave.

    Args:
        spec: the job's, resolved or not.

    Returns:
        Tokens, at least 1.

    Raises:
        InvalidValueError: when virtual tokens leave no room.
    """
    method, params = parse_tuning(spec.tuning)
    num_reserved = method.num_reserved_positions(params, base=base)
    room = base.context_length - num_reserved
    if room < 1:
        raise InvalidValueError(
            f"{num_reserved} virtual tokens leave no room for a real one: this base has "
            f"{base.context_length} positions. Use fewer.",
            param="tuning.num_virtual_tokens",
        )
    return room


def parse_tuning(tuning: dict[str, Any]) -> tuple[Method, MethodParams]:
    """Return the method that a checked `tuning` object names, and its parameters."""
    method = _method_of(tuning)
    return method, _parse(method, tuning)


def _resolve_dpo(asked: DpoOptions) -> DpoOptions:
    beta = DEFAULT_BETA if asked.beta == "auto" else asked.beta
    if not 0 < beta <= MAX_BETA:
        raise InvalidValueError(
            f"beta must be above 0 and at most {MAX_BETA:g}; got {beta}.",
            param="method.dpo.hyperparameters.beta",
        )
    return DpoOptions(beta=beta)


def _auto_epochs(num_rows: int, num_tokens: int) -> int:
    """Three passes over a few hundred rows, more over fewer, fewer over very many."""
    if num_rows < 60:
        return 6
    if num_rows < 150:
        return 4
    if num_rows < 5_000 and num_tokens < 5_000_000:
        return 3
    return 2 if num_rows < 20_000 else 1


def _auto_batch_size(num_rows: int) -> int:
    """A few hundred steps in all where there are few rows: steps teach, passes over the same rows less."""
    size = 4
    while size < 64 and num_rows >= size * 250:
        size *= 2
    return size


def _method_of(tuning: dict[str, Any]) -> Method:
    methods = discover()
    name = tuning.get("type", "lora")
    if not isinstance(name, str) or name not in methods:
        known = ", ".join(methods)
        raise InvalidValueError(
            f"tuning.type must be one of: {known}; got {str(name)[:40]!r}.", param="tuning.type"
        )
    return methods[name]


def _parse(method: Method, tuning: dict[str, Any]) -> MethodParams:
    try:
        params = method.Params.model_validate({"type": method.name, **tuning})
    except ValidationError as error:
        raise first_fault(error, tuning, list(method.Params.model_fields)) from error
    if getattr(params, "quantization", None) is not None:
        raise UnsupportedValueError(
            "tuning.quantization: quantised weights are multiplied by kernels that only CUDA devices have, "
            "and this service trains without them. Leave it out or use null.",
            param="tuning.quantization",
        )
    return params


def _check_range(name: str, value: int, largest: int) -> None:
    if not 1 <= value <= largest:
        raise InvalidValueError(
            f"{name} must be a whole number from 1 to {largest}; got {value}.",
            param=f"hyperparameters.{name}",
        )
