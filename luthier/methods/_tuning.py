"""The `tuning` object of a job: its check, its inheritance from a tuned model, and the values of "auto"."""

import json
from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from luthier.core.errors import (
    InvalidRequestError,
    InvalidValueError,
    UnsupportedValueError,
    advise,
    field_error,
    shown_part,
)
from luthier.core.specs import BaseFacts, DpoOptions, Hyperparameters, TrainingSpec
from luthier.methods.base import Method, MethodParams, Workload, check_room, discover

MAX_EPOCHS = 50
MAX_BATCH_SIZE = 256
MAX_BETA = 2.0
# As in the experiments of the paper (arXiv:2305.18290, appendix B).
DEFAULT_BETA = 0.1
# A pair pulls at the difference of two answers, which a rate made for one answer overshoots. Measured on our
# preference set (benchmarks/preferences.py) with lora: at a tenth 76 % of held-out pairs after two epochs, at
# this 89 %.
_DPO_RATE_SHARE = 0.3
# Shown of values in errors.
_MAX_INHERITED_CHARACTERS, _MAX_SENT_CHARACTERS = 60, 40


def check_tuning(tuning: dict[str, Any]) -> dict[str, Any]:
    """Return the `tuning` object of a request with its defaults filled in; `{}` is LoRA.

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
    """Return a spec that `is_resolved`, with the peak rate in `training.learning_rate`.

    Args:
        num_rows: training rows; pairs when the objective is dpo.
        num_tokens: tokens of those rows, one epoch.
        num_threads: CPU threads of every attempt.
        memory_bytes: memory of the training device, where it is known.

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
    """Return the tokens of the base's context that virtual tokens leave, at least 1.

    Raises:
        InvalidValueError: when virtual tokens leave no room.
    """
    method, params = parse_tuning(spec.tuning)
    num_reserved = method.num_reserved_positions(params, base=base)
    check_room(num_reserved, base.context_length)
    return base.context_length - num_reserved


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


def inherit_tuning(asked: dict[str, Any], parent: dict[str, Any], *, name: str) -> dict[str, Any]:
    """Return the tuning of a job that trains an artifact's weights further.

    The parent's type and shaping and starting parameters are kept; the rest is as requested, or its default.

    Args:
        asked: the request's object; `{}` requests nothing, "auto" of a shape the parent's.
        parent: the resolved `tuning` of the job that made the artifact.

    Raises:
        InvalidRequestError: when a member contradicts the parent's, or is wrong in itself; names it.
    """
    method, params = parse_tuning(parent)
    inherited = params.model_dump(mode="json")
    wanted = asked.get("type", method.name)
    if wanted != method.name:
        raise _contradiction("type", wanted, method.name, name)
    for member in _in_order(inherited, method.starting_params):
        if member in asked and asked[member] != inherited[member]:
            raise InvalidValueError(
                f"tuning.{member}: this job starts from the weights of {name}, so there are no first values "
                "to choose; leave it out.",
                param=f"tuning.{member}",
            )
    shapes = _in_order(inherited, method.shaping_params)
    kept = {member: inherited[member] for member in (*shapes, *method.starting_params)}
    sent = {key: value for key, value in asked.items() if key not in shapes or value != "auto"}
    found = check_tuning({"type": method.name, **kept, **sent})
    for member in shapes:
        if found[member] != inherited[member]:
            raise _contradiction(member, found[member], inherited[member], name)
    return found


def _in_order(params: dict[str, Any], members: frozenset[str]) -> list[str]:
    """Return members in the order of the parameters, so that of several faults the same one is reported."""
    return [member for member in params if member in members]


def _contradiction(member: str, asked: Any, inherited: Any, name: str) -> InvalidValueError:
    return InvalidValueError(
        f"tuning.{member}: {_shown(asked)} contradicts the {_shown(inherited)} of {name}; leave it out.",
        param=f"tuning.{member}",
    )


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    cut = text if len(text) <= _MAX_INHERITED_CHARACTERS else text[:_MAX_INHERITED_CHARACTERS] + "…"
    return cut.encode("unicode_escape").decode() if not cut.isprintable() else cut


_Path = tuple[str | int, ...]


def first_fault(error: ValidationError, tuning: dict[str, Any], known: Sequence[str]) -> InvalidRequestError:
    """Return the error for the first field with a fault.

    For a union (a name or a list of names) pydantic reports a fault of each branch; the one deepest in what
    was sent is the one meant. `param` is the field's path, such as `tuning.target_modules.1`.
    """
    faults = [(_path(fault["loc"], fault["type"], tuning), fault) for fault in error.errors()]
    field = faults[0][0][:1]
    path = max((path for path, _ in faults if path[:1] == field), key=len)
    of_path = [fault for found, fault in faults if found == path]
    param = ".".join(["tuning", *(shown_part(part) for part in path)])
    kinds = {str(fault["type"]) for fault in of_path}
    for kind in ("extra_forbidden", "missing"):
        if kind in kinds:
            return field_error(kind, param, "", advice=_advice(path, known))
    value = _value_at(path, tuning)
    rules = sorted({str(fault["msg"]).removeprefix("Value error, ") for fault in of_path})
    shown = repr(value)[:_MAX_SENT_CHARACTERS]
    message = f"Invalid value for '{param}': {shown}. {'; or: '.join(rules)}."
    # A number out of its range breaks a bound; the other branch of the union ("auto") is then no type fault.
    is_out_of_range = any(not kind.endswith(("_type", "_parsing", "literal_error")) for kind in kinds)
    is_value = is_out_of_range or isinstance(value, str)
    return field_error("value_error" if is_value else "value_type", param, message)


def _advice(path: _Path, known: Sequence[str]) -> str:
    if len(path) > 1:
        return "Leave it out."
    return f"{advise(str(path[0]), known)} This type of tuning takes: {', '.join(known)}."


def _path(location: Sequence[str | int], kind: str, tuning: dict[str, Any]) -> _Path:
    """Return the path of a fault in what was sent; pydantic's names of a union's branches are left out."""
    path: list[str | int] = []
    value: Any = tuning
    for place, part in enumerate(location):
        is_absent_field = place == len(location) - 1 and kind == "missing"
        if is_absent_field or _has(value, part) or not path:
            path.append(part)
            value = value[part] if _has(value, part) else None
    return tuple(path)


def _has(value: Any, part: str | int) -> bool:
    if isinstance(value, dict):
        return part in value
    return isinstance(value, list) and isinstance(part, int) and part < len(value)


def _value_at(path: _Path, tuning: dict[str, Any]) -> Any:
    value: Any = tuning
    for part in path:
        value = value[part] if _has(value, part) else None
    return value
