"""Laying out low-rank updates where a step reads them, all of a model's in one pass over memory.

Legend: R ranks, F ranks filled up to what kernels take at a time, K inputs and O outputs of a layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from luthier.modeling import kernels
from luthier.modeling.kernels._threads import launch
from luthier.modeling.kernels.blocks import lie_in_pairs, shape_of_blocks, to_blocks

# Of an update's facts: the addresses that its numbers are read from and written to, ranks filled up, and
# whether the kernel met one that is not finite.
FROM, TO, FILLED, WRONG = slice(0, 2), slice(2, 4), 5, -1


class Update(NamedTuple):
    """`scale * b a` beside a layer, as an artifact holds it and where it goes.

    `a_FK` and `blocks` (blocks.py) of a type that a base is served in, contiguous; whatever is in them
    is written over.
    """

    a_RK: torch.Tensor
    b_OR: torch.Tensor
    scale: float
    a_FK: torch.Tensor
    blocks: torch.Tensor


class WideUpdate(NamedTuple):
    """`scale * b a` beside a layer, as it is trained and where a training step's wide product reads it.

    `a_place_RK` contiguous; `b_place_OR` may be columns of a wider weight.
    """

    a_RK: torch.Tensor
    b_OR: torch.Tensor
    scale: float
    a_place_RK: torch.Tensor
    b_place_OR: torch.Tensor


def lay_low_ranks(updates: Sequence[Update]) -> None:
    """Write updates where they go, filled up with zeros.

    Args:
        updates: of finite numbers, to places of one type and device.

    Raises:
        ValueError: when a tensor's shape, type or device does not fit the others'.
    """
    if not updates:
        return
    like = updates[0].a_FK
    are_pairs = lie_in_pairs(like)
    for update in updates:
        _check(update, like, are_pairs=are_pairs)
    if not are_laid_by_kernel(updates):
        for update in updates:
            _lay_plainly(update)
    else:
        lay_facts(torch.tensor([facts_of(update) for update in updates]), like.dtype)


def are_laid_by_kernel(updates: Sequence[Update]) -> bool:
    """Whether `facts_of` these updates may be given to `lay_facts`."""
    return all(map(_is_compiled, updates))


def facts_of(update: Update) -> list[int]:
    """Return what the kernel is told of an update that it can read: four addresses, of `a_RK`, `b_OR`, `a_FK`
    and `blocks`, and further numbers, which do not depend on where anything lies."""
    tensors = (update.a_RK, update.b_OR, update.a_FK, update.blocks)
    sizes = (update.a_RK.shape[0], *update.a_FK.shape, update.b_OR.shape[0])
    return [*(one.data_ptr() for one in tensors), *sizes, kernels.float_bits(update.scale), 0]


def lay_facts(facts_UF: torch.Tensor, dtype: torch.dtype) -> bool:
    """Write updates where they go.

    Args:
        facts_UF: int64, of each what `facts_of` tells. Nothing tells whether the addresses are right.

    Returns:
        Whether all numbers that were read are finite.
    """
    launch(kernels.compiled_address("lay_low_ranks", dtype), [len(facts_UF), facts_UF.data_ptr()])
    return not bool(facts_UF[:, WRONG].any())


def widen_low_ranks(updates: Sequence[WideUpdate]) -> None:
    """Write updates where they go, `b` times its scale, in the type that is there.

    Raises:
        ValueError: when a tensor's shape or type does not fit the others'.
    """
    for update in updates:
        places = (update.a_place_RK, update.b_place_OR)
        has_shapes = [one.shape for one in update[:2]] == [one.shape for one in places]
        if not (
            has_shapes and len(update.a_RK) == update.b_OR.shape[1] and _are_alike(places, updates[0][3])
        ):
            raise ValueError("A low-rank update does not fit the place where it is to go.")
    if not all(map(_can_widen, updates)):
        for update in updates:
            update.a_place_RK.copy_(update.a_RK)
            update.b_place_OR.copy_(update.b_OR * update.scale)
    elif updates:
        facts = torch.tensor([_wide_facts(update) for update in updates])
        address = kernels.compiled_address("widen_low_ranks", updates[0].a_place_RK.dtype)
        launch(address, [len(updates), facts.data_ptr()])


def _can_widen(update: WideUpdate) -> bool:
    are_written = update.a_place_RK.is_contiguous() and update.b_place_OR.stride(1) == 1
    return _are_read(update.a_RK, update.b_OR) and are_written and kernels.is_compiled(update.a_place_RK)


def _are_read(*tensors: torch.Tensor) -> bool:
    """Whether kernels read an update that lies so."""
    return all(
        one.dtype == torch.float32 and one.is_contiguous() and kernels.is_compiled(one) for one in tensors
    )


def _are_alike(places: Sequence[torch.Tensor], like: torch.Tensor) -> bool:
    return all((one.dtype, one.device) == (like.dtype, like.device) for one in places)


def _wide_facts(update: WideUpdate) -> list[int]:
    tensors = (update.a_RK, update.b_OR, update.a_place_RK, update.b_place_OR)
    sizes = (*update.a_RK.shape, len(update.b_OR), update.b_place_OR.stride(0))
    return [*(one.data_ptr() for one in tensors), *sizes, kernels.float_bits(update.scale), 0]


def _check(update: Update, like: torch.Tensor, *, are_pairs: bool) -> None:
    (rank, num_inputs), (filled, num_places) = update.a_RK.shape, update.a_FK.shape
    num_outputs, width = update.b_OR.shape
    fits = width == rank <= filled and num_inputs == num_places and filled % 2 == 0
    expected = shape_of_blocks(filled, num_outputs, are_pairs=are_pairs)
    if not (fits and update.blocks.shape == expected and _are_alike((update.a_FK, update.blocks), like)):
        raise ValueError("A low-rank update does not fit the place where it is to go.")


def _is_compiled(update: Update) -> bool:
    are_written = update.a_FK.is_contiguous() and update.blocks.is_contiguous()
    return _are_read(update.a_RK, update.b_OR) and are_written and kernels.is_compiled(update.a_FK)


def _lay_plainly(update: Update) -> None:
    rank, like = len(update.a_RK), update.blocks
    filled_FO = like.new_zeros(len(update.a_FK), len(update.b_OR))
    filled_FO[:rank] = (update.b_OR.float() * update.scale).t()
    update.a_FK[:rank], update.a_FK[rank:] = update.a_RK, 0
    update.blocks.copy_(to_blocks(filled_FO))
