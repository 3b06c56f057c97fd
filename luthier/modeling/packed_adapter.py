"""An artifact laid out beside a packed base: its parts in the base's type, where the kernels look for them.

Legend: R ranks, K inputs and O outputs of a site, M bottleneck width, D hidden size, N virtual tokens, L
layers, H key heads, C head size.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from luthier.core.errors import ArtifactCorruptError
from luthier.methods._served import BottleneckPart, LowRankPart, ServedParts
from luthier.modeling.kernels.blocks import lie_in_pairs, shape_of_blocks, to_blocks
from luthier.modeling.kernels.laying import Update, lay_low_ranks
from luthier.modeling.kernels.page_memory import take_large
from luthier.modeling.kernels.served_rows import (
    ACTIVATIONS,
    NUM_SITES,
    BottleneckSite,
    Described,
    LowRankSite,
)
from luthier.modeling.packed_llama import MAX_MIDDLE, PackedLlama

_SITES = {
    "self_attn.q_proj": 0,
    "self_attn.k_proj": 1,
    "self_attn.v_proj": 2,
    "self_attn.o_proj": 3,
    "mlp.gate_proj": 4,
    "mlp.up_proj": 5,
    "mlp.down_proj": 6,
}
_HALVES = {"self_attn": 0, "mlp": 1}
_PATH = re.compile(r"model\.layers\.(\d+)\.(.+)")
# Ranks and widths are filled up to what the kernels take at a time.
_MULTIPLE = 4
# What the processor reads at a time, in bytes.
_LINE = 64


@dataclass(eq=False)
class PackedAdapter:
    """An adapter that rows of a packed base may bear.

    `described` is None where it has virtual tokens alone. `embeddings_ND` become keys and values when the
    base has run them once.
    """

    described: Described | None
    keys_NLHC: torch.Tensor | None = None
    values_NLHC: torch.Tensor | None = None
    embeddings_ND: torch.Tensor | None = None

    @property
    def num_virtual_tokens(self) -> int:
        """Tokens that lie before every sequence."""
        virtual = self.keys_NLHC if self.embeddings_ND is None else self.embeddings_ND
        return 0 if virtual is None else len(virtual)

    @property
    def num_bytes(self) -> int:
        """Memory that its tensors take."""
        found = (self.keys_NLHC, self.values_NLHC, self.embeddings_ND)
        tensors = [one for one in found if one is not None]
        if self.described is not None:
            for one in _all_sites(self.described.low_ranks, self.described.bottlenecks):
                tensors += _tensors_of(one).values()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def take_key_values(self, keys_NLHC: torch.Tensor, values_NLHC: torch.Tensor) -> None:
        """Keep what the base made of the input vectors in their place."""
        self.keys_NLHC, self.values_NLHC, self.embeddings_ND = keys_NLHC, values_NLHC, None


def can_lay_out(parts: ServedParts, base: PackedLlama) -> bool:
    """Whether every part has a place in a packed base; else the artifact goes by the plain path."""
    if parts.num_virtual_tokens >= base.context_length:
        return False
    for low_rank in parts.low_ranks:
        if low_rank.a_RK.shape[0] > MAX_MIDDLE or _site_of(low_rank.module, _SITES, base) is None:
            return False
    for bottleneck in parts.bottlenecks:
        place = _site_of(bottleneck.module, _HALVES, base)
        is_known = bottleneck.activation in ACTIVATIONS and len(bottleneck.down_M) <= MAX_MIDDLE
        if place is None or not is_known or (bottleneck.is_parallel and place[1] == 0):
            return False
    return True


def lay_out(
    parts: ServedParts,
    base: PackedLlama,
    read_weight: Callable[[str], torch.Tensor],
    take_memory: Callable[[int], torch.Tensor] = take_large,
) -> PackedAdapter:
    """Lay an artifact's parts out beside a base. Touches nothing of the base; any thread may call it.

    Args:
        parts: of the kind that `can_lay_out` tells.
        base: the base.
        read_weight: gives a linear layer's weight [O, K] by its path, for DoRA's norms.
        take_memory: gives so many bytes on a CPU, at a multiple of 64.

    Returns:
        The adapter; input vectors are still to be run by the base.

    Raises:
        ArtifactCorruptError: when two parts claim one place.
    """
    low_ranks: list[list[LowRankSite | None]] = [[None] * NUM_SITES for _ in range(base.num_layers)]
    bottlenecks: list[list[BottleneckSite | None]] = [[None, None] for _ in range(base.num_layers)]
    places: set[str] = set()
    placed: list[tuple[LowRankPart, int, int]] = []
    for low_rank in parts.low_ranks:
        layer, site = _place(low_rank.module, _SITES, base, places)
        low_ranks[layer][site] = _low_rank_site(low_rank, base, read_weight)
        placed.append((low_rank, layer, site))
    for bottleneck in parts.bottlenecks:
        layer, half = _place(bottleneck.module, _HALVES, base, places)
        bottlenecks[layer][half] = _bottleneck_site(bottleneck, base)
    has_sites = bool(parts.low_ranks or parts.bottlenecks)
    if has_sites:
        _lay_together(low_ranks, bottlenecks, base.device, take_memory)
    updates = []
    for part, layer, number in placed:
        laid = low_ranks[layer][number]
        assert laid is not None
        updates.append(Update(part.a_RK, part.b_OR, part.scale, laid.a_RK, laid.b))
    lay_low_ranks(updates)
    embeddings_ND = parts.embeddings_ND
    adapter = PackedAdapter(
        Described(low_ranks, bottlenecks) if has_sites else None,
        embeddings_ND=None if embeddings_ND is None else _typed(embeddings_ND, base),
    )
    if parts.key_values:
        by_layer = ([pair[kind].transpose(0, 1) for pair in parts.key_values] for kind in (0, 1))
        adapter.take_key_values(*(_typed(torch.stack(layers, dim=1), base) for layers in by_layer))
    return adapter


def _lay_together(
    low_ranks: list[list[LowRankSite | None]],
    bottlenecks: list[list[BottleneckSite | None]],
    device: torch.device,
    take_memory: Callable[[int], torch.Tensor],
) -> None:
    """Move all numbers into one piece of memory, in the order in which a step reads them.

    So the processor, which looks ahead, has one row's next site on the way while it works on the last. What
    has a shape and no numbers yet gets its place.
    """
    num_bytes = sum(_room_for(one) for one in _all_sites(low_ranks, bottlenecks))
    room = (
        take_memory(num_bytes)
        if device.type == "cpu"
        else torch.empty(num_bytes, dtype=torch.uint8, device=device)
    )
    for sites, halves in zip(low_ranks, bottlenecks, strict=True):
        steps = ((sites, range(4)), (halves, range(1)), (sites, range(4, NUM_SITES)), (halves, range(1, 2)))
        for kind, numbers in steps:
            for number in numbers:
                room = _move(kind, number, room)


def _move(sites: list[Any], number: int, room: torch.Tensor) -> torch.Tensor:
    """Move a site's numbers to the begin of some room, and return what is left of it."""
    site = sites[number]
    if site is None:
        return room
    moved = {}
    for name, tensor in _tensors_of(site).items():
        place = room[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        moved[name] = place if tensor.is_meta else place.copy_(tensor)
        room = room[_aligned(tensor.nbytes) :]
    sites[number] = replace(site, **moved)
    return room


def _all_sites(
    low_ranks: Sequence[Sequence[LowRankSite | None]], bottlenecks: Sequence[Sequence[BottleneckSite | None]]
) -> list[LowRankSite | BottleneckSite]:
    return [one for one in itertools.chain(*low_ranks, *bottlenecks) if one is not None]


def _tensors_of(site: LowRankSite | BottleneckSite) -> dict[str, torch.Tensor]:
    held = ((one.name, getattr(site, one.name)) for one in fields(site))
    return {name: value for name, value in held if isinstance(value, torch.Tensor)}


def _room_for(site: LowRankSite | BottleneckSite) -> int:
    return sum(_aligned(one.nbytes) for one in _tensors_of(site).values())


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _LINE) * _LINE


def _site_of(module: str, names: dict[str, int], base: PackedLlama) -> tuple[int, int] | None:
    found = _PATH.fullmatch(module)
    if found is None or found[2] not in names or int(found[1]) >= base.num_layers:
        return None
    return int(found[1]), names[found[2]]


def _place(module: str, names: dict[str, int], base: PackedLlama, taken: set[str]) -> tuple[int, int]:
    place = _site_of(module, names, base)
    if place is None or module in taken:
        raise ArtifactCorruptError("The artifact's layers don't fit its base.")
    taken.add(module)
    return place


def _low_rank_site(
    part: LowRankPart, base: PackedLlama, read_weight: Callable[[str], torch.Tensor]
) -> LowRankSite:
    """Return a site of which the factors are there, and of the update only its shapes."""
    factor_O = None
    if part.magnitude_O is not None:
        # The norm of every output's whole weight (Liu et al. 2024, arXiv 2402.09353, section 4.1).
        scaled_OR = part.b_OR.float() * part.scale
        whole_OK = read_weight(part.module).float() + scaled_OR @ part.a_RK.float()
        factor_O = (part.magnitude_O.float() / whole_OK.norm(dim=1)).to(base.device).contiguous()
    filled, num_inputs = _filled_up(part.a_RK.shape[0]), part.a_RK.shape[1]
    are_pairs = lie_in_pairs(base.embedding_VD)
    shapes = ((filled, num_inputs), shape_of_blocks(filled, len(part.b_OR), are_pairs=are_pairs))
    a_FK, blocks = (torch.empty(shape, dtype=base.dtype, device="meta") for shape in shapes)
    return LowRankSite(a_FK, blocks, factor_O)


def _bottleneck_site(part: BottleneckPart, base: PackedLlama) -> BottleneckSite:
    return BottleneckSite(
        _filled(part.down_MD, base),
        _filled(part.down_M, base, dtype=torch.float32),
        to_blocks(_filled(part.up_DM.t(), base)),
        part.up_D.to(device=base.device, dtype=torch.float32).contiguous(),
        part.activation,
        part.is_parallel,
    )


def _filled(rows: torch.Tensor, base: PackedLlama, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return rows in the base's type, filled up with zero rows; a copy that is the adapter's own."""
    whole = torch.zeros(
        (_filled_up(rows.shape[0]), *rows.shape[1:]), dtype=dtype or base.dtype, device=base.device
    )
    whole[: rows.shape[0]] = rows
    return whole


def _filled_up(count: int) -> int:
    return -(-count // _MULTIPLE) * _MULTIPLE


def _typed(tensor: torch.Tensor, base: PackedLlama) -> torch.Tensor:
    return tensor.to(device=base.device, dtype=base.dtype).contiguous()
