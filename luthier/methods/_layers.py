"""Selection of a base's layers or weights by group, by name, or by a regular expression with a time limit."""

import re
import time
from typing import TYPE_CHECKING, Annotated

import regex
from pydantic import Field, StringConstraints

from luthier.core.errors import InvalidValueError
from luthier.core.shapes import EXPERTS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


_Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]
# A group or a regular expression; or a list of names.
Selection = _Name | Annotated[list[_Name], Field(min_length=1, max_length=64)]

PARAM = "tuning.target_modules"
MATCH_SECONDS = 2.0

# Parts of module paths that mark a block's two halves, over the architectures that transformers has.
_ATTENTION = re.compile(r"(^|[._])(attn|attention|self_attn|self_attention|mixer)([._]|$)")
_FEED_FORWARD = re.compile(
    r"(^|[._])(mlp|ffn|feed_forward|experts?|block_sparse_moe|fc1|fc2|fc_in|fc_out)([._]|$)"
)


def linear_shapes(causal_lm: "PreTrainedModel") -> dict[str, tuple[int, int]]:
    """List the base's linear layers, the output layer left out.

    Returns:
        Module path to (inputs, outputs), in the model's order. GPT-2's Conv1D counts as linear.
    """
    import torch
    from transformers.pytorch_utils import Conv1D

    head = causal_lm.get_output_embeddings()
    shapes: dict[str, tuple[int, int]] = {}
    for name, module in causal_lm.named_modules():
        if module is head:
            continue
        if isinstance(module, torch.nn.Linear):
            shapes[name] = (module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            shapes[name] = (module.nx, module.nf)
    return shapes


def has_experts(causal_lm: "PreTrainedModel") -> bool:
    """Whether blocks are mixtures of experts, whose weights the model keeps outside of linear layers."""
    return any(EXPERTS.search(name) for name, _ in causal_lm.named_parameters())


def choose_layers(
    shapes: dict[str, tuple[int, int]], target_modules: str | list[str], *, has_experts: bool = False
) -> dict[str, tuple[int, int]]:
    """Return the part of `shapes` that `target_modules` selects; never empty.

    Args:
        shapes: of `linear_shapes`.
        target_modules: "all-linear", "attention", "mlp", a list of names (the path's end), or a regular
            expression for the whole path.

    Raises:
        InvalidValueError: when a name or pattern matches no linear layer (lists the names there are), when
            matching the pattern takes too long, or when a group has experts, which are no linear layers.
    """
    if isinstance(target_modules, list):
        for wanted in target_modules:
            if not any(_ends_with(path, wanted) for path in shapes):
                raise _nothing_matches(wanted, shapes)
        return {
            path: shape
            for path, shape in shapes.items()
            if any(_ends_with(path, wanted) for wanted in target_modules)
        }
    if has_experts and target_modules in {"all-linear", "mlp"}:
        raise InvalidValueError(
            f"'{target_modules}' names this base's experts too, which low-rank updates can't train here. "
            "Use 'attention', or name the layers.",
            param=PARAM,
        )
    if target_modules == "all-linear":
        chosen = dict(shapes)
    elif target_modules in {"attention", "mlp"}:
        pattern = _ATTENTION if target_modules == "attention" else _FEED_FORWARD
        chosen = {path: shape for path, shape in shapes.items() if pattern.search(path)}
    else:
        chosen = {path: shapes[path] for path in match_paths(target_modules, list(shapes), "layers", PARAM)}
    if not chosen:
        raise _nothing_matches(target_modules, shapes)
    return chosen


def shortest_names(chosen: dict[str, tuple[int, int]], shapes: dict[str, tuple[int, int]]) -> list[str]:
    """Return the shortest endings of paths that pick exactly the chosen layers, sorted.

    One component (`q_proj`) where that is enough, which is what other tools expect; more (`attn.c_proj`)
    where one would pick layers that were not chosen.
    """
    longest = max(path.count(".") for path in chosen) + 1
    for num_parts in range(1, longest):
        names = {".".join(path.split(".")[-num_parts:]) for path in chosen}
        picked = {path for path in shapes if any(_ends_with(path, name) for name in names)}
        if picked == set(chosen):
            return sorted(names)
    return sorted(chosen)


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _nothing_matches(wanted: str, shapes: dict[str, tuple[int, int]]) -> InvalidValueError:
    known = ", ".join(sorted({path.rsplit(".", 1)[-1] for path in shapes}))
    return InvalidValueError(
        f"{wanted[:80]!r} matches no linear layer of this base. Its linear layers are: {known}. "
        "Or use 'all-linear', 'attention' or 'mlp'.",
        param=PARAM,
    )


def check_pattern(value: str | list[str] | None) -> str | list[str] | None:
    """Return a selection whose regular expression, if it is one, compiles; for a field's validator."""
    if isinstance(value, str):
        try:
            regex.compile(value)
        except regex.error as error:
            raise ValueError(f"is no valid regular expression: {error}") from error
        except RecursionError as error:
            raise ValueError("is nested too deeply; use a simpler pattern") from error
    return value


def match_paths(pattern: str, paths: list[str], what: str, param: str) -> list[str]:
    """Return the paths that a pattern, which compiles, matches as a whole, in their order.

    A pattern that users write may backtrack for ever, so that matching has a limit of time.

    Args:
        what: what the paths are, for the error.

    Raises:
        InvalidValueError: when matching takes more than `MATCH_SECONDS`.
    """
    compiled = regex.compile(pattern)
    deadline = time.monotonic() + MATCH_SECONDS
    found = []
    try:
        for path in paths:
            seconds = max(deadline - time.monotonic(), 0.001)
            if compiled.fullmatch(path, timeout=seconds) is not None:
                found.append(path)
    except TimeoutError as error:
        raise InvalidValueError(
            f"Matching {pattern[:40]!r} against this base's {what} takes more than {MATCH_SECONDS:g} s. Use "
            "a simpler pattern or a list of names.",
            param=param,
        ) from error
    return found
