"""An artifact packed beside a base: its parts in the base's type, where the kernels look for them.

Legend: R ranks, K inputs and O outputs of a site, M bottleneck width, D hidden size, N virtual tokens, L
layers, H key heads, C head size.
"""

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch.nn import functional

from luthier.core.errors import ArtifactCorruptError
from luthier.methods import BottleneckPart, LowRankPart, ServedParts
from luthier_cpu.codegen.page_memory import LINE
from luthier_cpu.decode.batch_layout import (
    ACTIVATIONS,
    NUM_SITES,
    PAGE_SIZE,
    AdapterDescriptor,
    BottleneckSite,
    LowRankSite,
    Pages,
)
from luthier_cpu.decode.blocks import BLOCK, are_paired, by_blocks, shape_of_blocks, to_blocks
from luthier_cpu.decode.llama import MAX_MIDDLE, PackedLlama

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


@dataclass(eq=False)
class PackedAdapter:
    """An adapter of a packed base's rows.

    `descriptor` is None where it has virtual tokens alone. `embeddings_ND` become keys and values when the
    base has run them once.
    """

    descriptor: AdapterDescriptor | None
    keys_NLHC: torch.Tensor | None = None
    values_NLHC: torch.Tensor | None = None
    embeddings_ND: torch.Tensor | None = None

    @property
    def num_virtual_tokens(self) -> int:
        """Tokens before every sequence."""
        virtual = self.keys_NLHC if self.embeddings_ND is None else self.embeddings_ND
        return 0 if virtual is None else len(virtual)

    @property
    def num_bytes(self) -> int:
        """Memory that its tensors take."""
        found = (self.keys_NLHC, self.values_NLHC, self.embeddings_ND)
        tensors = [one for one in found if one is not None]
        if self.descriptor is not None:
            sites = itertools.chain(*self.descriptor.low_ranks, *self.descriptor.bottlenecks)
            tensors += [tensor for site in sites if site is not None for tensor in site.tensors.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def take_key_values(self, keys_NLHC: torch.Tensor, values_NLHC: torch.Tensor) -> None:
        """Keep what the base made of the input vectors in their place."""
        self.keys_NLHC, self.values_NLHC, self.embeddings_ND = keys_NLHC, values_NLHC, None

    @torch.inference_mode()
    def write_virtual(self, pages: Pages, owned: Sequence[int], first: int = 0) -> None:
        """Put its keys and values into the first pages of a sequence, where it has any."""
        if self.keys_NLHC is None or self.values_NLHC is None:
            return
        positions = torch.arange(first, self.num_virtual_tokens)
        page_N = torch.tensor(owned)[positions // PAGE_SIZE]
        pages.write(page_N, positions % PAGE_SIZE, self.keys_NLHC[first:], self.values_NLHC[first:])


def can_pack_adapter(parts: ServedParts, base: PackedLlama) -> bool:
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


def pack_adapter(
    parts: ServedParts,
    base: PackedLlama,
    read_weight: Callable[[str], torch.Tensor],
) -> PackedAdapter:
    """Lay an artifact's parts out beside a base. Touches nothing of the base; any thread may call it.

    Args:
        parts: which `can_pack_adapter` accepts.
        read_weight: gives a linear layer's weight [O, K] by its path, for DoRA's norms.

    Returns:
        The adapter; input vectors are still to be run by the base.

    Raises:
        ArtifactCorruptError: when two parts claim one place.
    """
    places: set[str] = set()
    low_ranks = {
        _place(one.module, _SITES, base, places): _plan(one, base, read_weight) for one in parts.low_ranks
    }
    bottlenecks = {
        _place(one.module, _HALVES, base, places): _bottleneck_site(one, base) for one in parts.bottlenecks
    }
    has_sites = bool(low_ranks or bottlenecks)
    descriptor = _pack_together(low_ranks, bottlenecks, base) if has_sites else None
    embeddings_ND = parts.embeddings_ND
    adapter = PackedAdapter(
        descriptor,
        # A copy: the base runs them when their file may be another.
        embeddings_ND=None if embeddings_ND is None else _typed(embeddings_ND.clone(), base),
    )
    if parts.key_values:
        by_layer = ([pair[kind].transpose(0, 1) for pair in parts.key_values] for kind in (0, 1))
        adapter.take_key_values(*(_typed(torch.stack(layers, dim=1), base) for layers in by_layer))
    return adapter


class _Room:
    """Memory that is given out from its begin to its end, every piece from the begin of a line on."""

    def __init__(self, memory: torch.Tensor) -> None:
        self._memory = memory
        self._typed: dict[torch.dtype, torch.Tensor] = {}
        self._begin = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return room for numbers, whatever is in it."""
        size = dtype.itemsize
        typed = self._typed.get(dtype)
        if typed is None:
            whole = len(self._memory) // size * size
            typed = self._typed[dtype] = self._memory[:whole].view(dtype)
        count, begin = math.prod(shape), self._begin // size
        self._begin += _aligned(count * size)
        return typed[begin : begin + count].view(shape)

    def move(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of numbers in this room."""
        return self.take(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def _pack_together(
    low_ranks: dict[tuple[int, int], "_Plan"],
    bottlenecks: dict[tuple[int, int], BottleneckSite],
    base: PackedLlama,
) -> AdapterDescriptor:
    """Lay all numbers into one piece of memory, in the order in which a step reads them.

    So the processor, which looks ahead, has one row's next site on the way while it works on the last.
    """
    num_bytes = sum(one.num_bytes for one in low_ranks.values())
    num_bytes += sum(_aligned(one.nbytes) for site in bottlenecks.values() for one in site.tensors.values())
    room = _Room(torch.empty(num_bytes, dtype=torch.uint8))
    sites: list[list[LowRankSite | None]] = [[None] * NUM_SITES for _ in range(base.num_layers)]
    halves: list[list[BottleneckSite | None]] = [[None, None] for _ in range(base.num_layers)]
    for layer in range(base.num_layers):
        for half, numbers in enumerate((range(4), range(4, NUM_SITES))):
            for number in numbers:
                plan = low_ranks.get((layer, number))
                if plan is not None:
                    sites[layer][number] = plan.pack(room)
            bottleneck = bottlenecks.get((layer, half))
            if bottleneck is not None:
                moved = {name: room.move(one) for name, one in bottleneck.tensors.items()}
                halves[layer][half] = replace(bottleneck, **moved)
    return AdapterDescriptor(sites, halves)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // LINE) * LINE


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


@dataclass(frozen=True, eq=False)
class _Plan:
    """The shapes that an update is packed in, and its factors."""

    part: LowRankPart
    dtype: torch.dtype
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    factor_O: torch.Tensor | None

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        numbers = sum(_aligned(math.prod(shape) * self.dtype.itemsize) for shape in self.shapes)
        return numbers + (0 if self.factor_O is None else _aligned(self.factor_O.nbytes))

    def pack(self, room: _Room) -> LowRankSite:
        """Write the update into some room, ranks filled up with zeros."""
        a_FK, blocks = (room.take(shape, self.dtype) for shape in self.shapes)
        rank = len(self.part.a_RK)
        a_FK[:rank], a_FK[rank:] = self.part.a_RK, 0
        scaled_OR = self.part.b_OR.float() * self.part.scale
        filled_OF = functional.pad(scaled_OR, (0, len(a_FK) - rank, 0, -len(scaled_OR) % BLOCK))
        # Rounded to the type that is there as it is copied.
        blocks.copy_(by_blocks(filled_OF, are_pairs=blocks.dim() == 4))
        return LowRankSite(a_FK, blocks, None if self.factor_O is None else room.move(self.factor_O))


def _plan(part: LowRankPart, base: PackedLlama, read_weight: Callable[[str], torch.Tensor]) -> _Plan:
    factor_O = None
    if part.magnitude_O is not None:
        # The norm of every output's whole weight (Liu et al. 2024, arXiv 2402.09353, section 4.1).
        scaled_OR = part.b_OR.float() * part.scale
        whole_OK = read_weight(part.module).float() + scaled_OR @ part.a_RK.float()
        factor_O = (part.magnitude_O.float() / whole_OK.norm(dim=1)).contiguous()
    (rank, num_inputs), num_outputs = part.a_RK.shape, part.b_OR.shape[0]
    filled, are_pairs = _filled_up(rank), are_paired(base.embedding_VD)
    shapes = (filled, num_inputs), shape_of_blocks(filled, num_outputs, are_pairs=are_pairs)
    return _Plan(part, base.dtype, shapes, factor_O)


def _bottleneck_site(part: BottleneckPart, base: PackedLlama) -> BottleneckSite:
    return BottleneckSite(
        _filled(part.down_MD, base),
        _filled(part.down_M, base, dtype=torch.float32),
        to_blocks(_filled(part.up_DM.t(), base)),
        part.up_D.float().contiguous(),
        part.activation,
        part.is_parallel,
    )


def _filled(rows: torch.Tensor, base: PackedLlama, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Return rows in the base's type, filled up with zero rows; a copy that is the adapter's own."""
    whole = torch.zeros((_filled_up(rows.shape[0]), *rows.shape[1:]), dtype=dtype or base.dtype)
    whole[: rows.shape[0]] = rows
    return whole


def _filled_up(count: int) -> int:
    return -(-count // _MULTIPLE) * _MULTIPLE


def _typed(tensor: torch.Tensor, base: PackedLlama) -> torch.Tensor:
    return tensor.to(base.dtype).contiguous()
