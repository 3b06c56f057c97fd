"""Low-rank updates and bottlenecks of all adapters on a model, stacked by module.

The tokens of a pass are sorted by adapter, those without one first. Few tokens are multiplied with the
matrices of all their adapters together, and what belongs to another adapter is set to 0 between the two
products: two ordinary products read every weight once. Many tokens run by grouped products, which multiply
the tokens of every slot with the slot's own matrix. Neither number of kernels
depends on the number of adapters.

Legend: T tokens of this pass that have adapters, D hidden size, R adapter rank or bottleneck width, P slots
of adapters, U slots of this pass, I inputs and O outputs of a layer.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import grouped_mm
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from luthier.core.errors import ArtifactCorruptError, SelfCheckError
from luthier.inference.runners._onednn import row_major
from luthier.methods.base import BottleneckPart, LowRankPart, ServedParts
from luthier.modeling.protocols import UnsupportedAdapterError

# Grouped products want rows of whole 16 bytes.
_ROW_BYTES = 16
_FIRST_WIDTH = 8
_FIRST_SLOTS = 4
# Stands in a shape for the rank or width, which differs by adapter.
_WIDTH = -1
_LOW_RANK, _FACTORS, _BOTTLENECK = "low_rank", "factors", "bottleneck"
# Tokens times slots of a pass up to which every token is multiplied with the matrices of every slot.
_MAX_PAIRS = 1024


class AdapterTokens:
    """Which of a pass's tokens have adapters with stacks: all from `first` on.

    Args:
        slots: of each of them, sorted.
        num_slots: of the stacks.
        send: moves integers to the device.
    """

    def __init__(self, first: int, slots: list[int], num_slots: int, send: Any) -> None:
        self.first = first
        self.slots = sorted(set(slots))
        self.slots_T: torch.Tensor = send(slots)
        self.is_grouped = len(slots) * len(self.slots) > _MAX_PAIRS
        if self.is_grouped:
            ends = [sum(slot <= last for slot in slots) for last in range(num_slots)]
            self._ends_P = send(ends).to(torch.int32)
            return
        # Stacks of which a small part is used are gathered.
        self._range = slice(self.slots[0], self.slots[-1] + 1)
        is_gathered = self._range.stop - self._range.start > 2 * len(self.slots)
        self._slots_U = send(self.slots) if is_gathered else None
        used = self.slots if is_gathered else range(self._range.start, self._range.stop)
        others = [[slot != own for slot in used] for own in slots]
        self._others_TU1 = send(others).bool()[:, :, None] if len(used) > 1 else None

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Return a view of the tokens that have adapters."""
        return x.view(-1, x.shape[-1])[self.first :]

    def shrink(self, x_TI: torch.Tensor, stack_PRI: torch.Tensor) -> torch.Tensor:
        """Multiply tokens with their slots' matrices; return [T, R], or [T, U, R] with products of others."""
        if self.is_grouped:
            return grouped_mm(x_TI, stack_PRI.transpose(1, 2), offs=self._ends_P)
        used_URI = self._used(stack_PRI)
        return (x_TI @ used_URI.flatten(0, 1).t()).view(len(x_TI), *used_URI.shape[:2])

    def add_expanded(self, out_TO: torch.Tensor, middle: torch.Tensor, stack_PRO: torch.Tensor) -> None:
        """Multiply what `shrink` returned with the slots' second matrices, and add it to `out_TO`."""
        if self.is_grouped:
            out_TO += grouped_mm(middle, stack_PRO, offs=self._ends_P)
            return
        if self._others_TU1 is not None:
            middle.masked_fill_(self._others_TU1, 0.0)
        out_TO.addmm_(middle.flatten(1), self._used(stack_PRO).flatten(0, 1))

    def add_bias(self, middle: torch.Tensor, bias_PR: torch.Tensor) -> torch.Tensor:
        """Add a bias to what `shrink` returned."""
        if self.is_grouped:
            return middle.add_(bias_PR.index_select(0, self.slots_T))
        return middle.add_(self._used(bias_PR))

    def _used(self, stack: torch.Tensor) -> torch.Tensor:
        return stack[self._range] if self._slots_U is None else stack.index_select(0, self._slots_U)


@dataclass(frozen=True, eq=False)
class Placement:
    """Tensors of an adapter for one stack, which `key` names; `width` stands for `_WIDTH` in its shapes."""

    key: tuple[Any, ...]
    shapes: Sequence[tuple[int, ...]]
    values: list[torch.Tensor]
    width: int


class _Stack:
    """Tensors of the same meaning of all adapters, by slot; zero where a slot's adapter has none."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], num_slots: int, like: torch.Tensor) -> None:
        self.users: set[int] = set()
        self._shapes, self._like, self._width = shapes, like, _FIRST_WIDTH
        self.tensors: list[torch.Tensor] = []
        self.grow(num_slots, _FIRST_WIDTH)

    def grow(self, num_slots: int, width: int) -> None:
        """Make room for more slots, or for wider tensors, by doubling."""
        while self._width < width:
            self._width *= 2
        sizes = [[self._width if size == _WIDTH else size for size in shape] for shape in self._shapes]
        grown = [self._like.new_zeros(num_slots, *size) for size in sizes]
        for new, old in zip(grown, self.tensors, strict=False):
            new[tuple(map(slice, old.shape))] = old
        self.tensors = grown

    def put(self, slot: int, values: Sequence[torch.Tensor], width: int) -> None:
        """Set a slot's tensors, which may be narrower than the stack."""
        if width > self._width:
            self.grow(len(self.tensors[0]), width)
        self.users.add(slot)
        for tensor, value in zip(self.tensors, values, strict=True):
            tensor[(slot, *map(slice, value.shape))] = value.to(tensor)

    def clear(self, slot: int) -> None:
        """Zero a slot."""
        if slot in self.users:
            for tensor in self.tensors:
                tensor[slot].zero_()
            self.users.remove(slot)


class AdapterStacks:
    """The stacks of a model and the hooks that apply them.

    Args:
        linears: the linear layers that see every token of a pass, by path.
    """

    def __init__(self, model: nn.Module, linears: dict[str, nn.Module], like: torch.Tensor) -> None:
        self.tokens: AdapterTokens | None = None
        self._model, self._linears, self._like = model, linears, like
        self._stacks: dict[tuple[Any, ...], _Stack] = {}
        self._hooks: list[RemovableHandle] = []
        self._free: list[int] = list(range(_FIRST_SLOTS))
        self.num_slots = _FIRST_SLOTS

    @torch.no_grad()
    def prepare(self, parts: ServedParts) -> list["Placement"]:
        """Convert an adapter's parts. Touches nothing that a pass uses.

        Raises:
            ArtifactCorruptError: when a part fits no module.
            SelfCheckError: when a value is not finite: 0 times it would reach other adapters' tokens.
            UnsupportedAdapterError: when a module can't be updated here.
        """
        found = [one for part in parts.low_ranks for one in self._place_low_rank(part)]
        found += [self._place_bottleneck(part) for part in parts.bottlenecks]
        if not all(bool(value.isfinite().all()) for one in found for value in one.values):
            raise SelfCheckError("The model's weights are not finite; it is not served.")
        return found

    @torch.no_grad()
    def add(self, placements: Sequence["Placement"]) -> int:
        """Stack what `prepare` returned, and return its slot."""
        if not self._free:
            self._free = list(range(self.num_slots, 2 * self.num_slots))
            self.num_slots *= 2
            for stack in self._stacks.values():
                stack.grow(self.num_slots, 0)
        # The lowest: those of a pass are near each other.
        slot = min(self._free)
        self._free.remove(slot)
        for one in placements:
            if one.key not in self._stacks:
                self._stacks[one.key] = _Stack(one.shapes, self.num_slots, self._like)
                self._add_hook(one.key)
            self._stacks[one.key].put(slot, one.values, one.width)
        return slot

    def remove(self, slot: int) -> None:
        """Free a slot."""
        for stack in self._stacks.values():
            stack.clear(slot)
        self._free.append(slot)

    def close(self) -> None:
        """Take the hooks off the model and free all stacks."""
        while self._hooks:
            self._hooks.pop().remove()
        self._stacks.clear()

    def _place_low_rank(self, part: LowRankPart) -> Iterator["Placement"]:
        module = self._linears.get(part.module)
        if module is None:
            raise UnsupportedAdapterError(
                f"{part.module} is no linear layer that every token passes, so it can't be updated here."
            )
        num_inputs, num_outputs = _sizes(module)
        rank = len(part.a_RK)
        if part.a_RK.shape != (rank, num_inputs) or part.b_OR.shape != (num_outputs, rank):
            raise ArtifactCorruptError("The artifact's LoRA layers don't fit its base.")
        self._check_sizes(part.module, num_inputs, num_outputs)
        b_OR = part.b_OR.to(self._like.device, torch.float32) * part.scale
        if part.magnitude_O is not None:
            factor_O = _dora_factor(module, part, b_OR)
            values = [(factor_O - 1.0).to(self._like)]
            yield Placement((_FACTORS, part.module), [(num_outputs,)], values, 0)
            b_OR = b_OR * factor_O[:, None]
        shapes = [(_WIDTH, num_inputs), (_WIDTH, num_outputs)]
        values = [part.a_RK.to(self._like), b_OR.T.to(self._like)]
        yield Placement((_LOW_RANK, part.module), shapes, values, rank)

    def _place_bottleneck(self, part: BottleneckPart) -> "Placement":
        try:
            self._model.get_submodule(part.module)
        except AttributeError as error:
            raise ArtifactCorruptError("The adapter has a layer for a module that its base lacks.") from error
        width, size = part.down_MD.shape
        self._check_sizes(part.module, size)
        shapes = [(_WIDTH, size), (_WIDTH,), (_WIDTH, size), (size,)]
        values = [part.down_MD, part.down_M, part.up_DM.T, part.up_D]
        key = _BOTTLENECK, part.module, part.activation, part.is_parallel
        return Placement(key, shapes, [value.to(self._like) for value in values], width)

    def _check_sizes(self, module: str, *sizes: int) -> None:
        if any(size * self._like.itemsize % _ROW_BYTES for size in sizes):
            raise UnsupportedAdapterError(
                f"The rows of {module} are no multiple of {_ROW_BYTES} bytes, so it can't be updated here."
            )

    def _add_hook(self, key: tuple[Any, ...]) -> None:
        """Apply a stack after its module; factors are applied with the low-rank update."""
        kind, path, *options = key
        module, stack = self._model.get_submodule(path), self._stacks[key]
        if kind == _LOW_RANK:
            self._hooks.append(module.register_forward_hook(self._low_rank_hook(path, stack)))
        elif kind == _BOTTLENECK:
            hook = self._bottleneck_hook(stack, *options)
            self._hooks.append(module.register_forward_hook(hook, with_kwargs=True))

    def _low_rank_hook(self, path: str, stack: _Stack) -> Any:
        def add(module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
            tokens = self.tokens
            if tokens is None or stack.users.isdisjoint(tokens.slots):
                return
            x_TI, out_TO = tokens.of(args[0]), tokens.of(output)
            factors = self._stacks.get((_FACTORS, path))
            if factors is not None and not factors.users.isdisjoint(tokens.slots):
                without_TO = out_TO if module.bias is None else out_TO - module.bias
                out_TO.addcmul_(without_TO, factors.tensors[0].index_select(0, tokens.slots_T))
            a_PRI, b_PRO = stack.tensors
            tokens.add_expanded(out_TO, tokens.shrink(x_TI, a_PRI), b_PRO)

        return add

    def _bottleneck_hook(self, stack: _Stack, activation: str, is_parallel: bool) -> Any:
        activate = getattr(nn.functional, activation)

        def add(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            tokens = self.tokens
            if tokens is None or stack.users.isdisjoint(tokens.slots):
                return
            out_TD = tokens.of(output[0] if isinstance(output, tuple) else output)
            x_TD = out_TD
            if is_parallel:
                x_TD = tokens.of(args[0] if args else kwargs["hidden_states"])
            down_PRD, down_PR, up_PRD, up_PD = stack.tensors
            middle = activate(tokens.add_bias(tokens.shrink(x_TD, down_PRD), down_PR))
            tokens.add_expanded(out_TD, middle, up_PRD)
            out_TD += up_PD.index_select(0, tokens.slots_T)

        return add


def _sizes(module: nn.Module) -> tuple[int, int]:
    """Return how many inputs and outputs a linear layer has."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.nx, module.nf


def _dora_factor(module: nn.Module, part: LowRankPart, scaled_b_OR: torch.Tensor) -> torch.Tensor:
    """Return the magnitudes over the norms of the updated rows (Liu et al. 2024, equation 5)."""
    if type(module) not in (nn.Linear, Conv1D):
        raise UnsupportedAdapterError(f"{part.module} has packed weights, whose norms DoRA needs.")
    weight_OI = row_major(module.weight) if isinstance(module, nn.Linear) else module.weight.T
    a_RI = part.a_RK.to(scaled_b_OR)
    norm_O = torch.linalg.vector_norm(weight_OI.float() + scaled_b_OR @ a_RI, dim=1)
    assert part.magnitude_O is not None
    return part.magnitude_O.to(norm_O) / norm_O
