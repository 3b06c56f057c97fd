"""What is given to a decode step's kernels: adapters as tables, pages of keys and values, rows of one token.

An adapter is described by a table of int64 that the kernels read. Each layer has the entries of seven linear
sites (q, k, v, o, gate, up, down), four numbers each: addresses of A [R, inputs] and of B with its scale in
it, in blocks of its outputs (blocks.py), R, and the address of float32 factors of the outputs or 0; R is 0
where there is no update. Then those of two bottlenecks (after attention, after the feed-forward), seven
numbers each: addresses of down [M, D], its float32 bias, up in blocks, its float32 bias, then M, the
activation's number, and whether it reads the half's input. R and M are multiples of 4, filled up with zeros.
Last come the regions of the sites that share an input (q, k and v; o; gate and up; down), two numbers each:
where what is read of them begins and how many bytes it is, which a product asks for before it is wanted.

Legend: N tokens, M rows of one token (in a bottleneck its width), D hidden size, K inputs and O outputs of a
site, R ranks, E columns of q, k and v, H key heads, C head size, S tokens of a page, W pages of the longest
row.
"""

from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field

import numpy as np
import torch
from torch.nn import functional

from luthier_cpu.codegen.page_memory import discard
from luthier_cpu.decode.blocks import check_blocks, times_blocks

PAGE_SIZE = 16
NUM_SITES = 7
# Queries of a key head that a kernel attends with at a time.
MAX_QUERIES = 4
# Tokens of a chunk, and ranks, that a kernel takes at a time.
PREFILL_BLOCK, PREFILL_RANK = 64, 128
# Blocks of 16 queries, and keys, that a kernel attends with at a time.
ATTENTION_BLOCKS, ATTENTION_KEYS = 16, 128
# Most bytes between two parts of an adapter that are prefetched together.
_MOST_BETWEEN = 4096
ACTIVATIONS = {"gelu": 1, "relu": 2, "silu": 3, "tanh": 4}
# Sites that share an input and are one product: slices of the seven.
ATTENTION_IN, ATTENTION_OUT = slice(0, 3), slice(3, 4)
FEED_FORWARD_IN, FEED_FORWARD_OUT = slice(4, 6), slice(6, 7)
_GROUPS = (ATTENTION_IN, ATTENTION_OUT, FEED_FORWARD_IN, FEED_FORWARD_OUT)

SITE_ENTRIES, BOTTLENECK_ENTRIES, REGION_ENTRIES = 4, 7, 2
_REGIONS_AT = NUM_SITES * SITE_ENTRIES + 2 * BOTTLENECK_ENTRIES
LAYER_ENTRIES = _REGIONS_AT + len(_GROUPS) * REGION_ENTRIES


def region_entry(layer: int, sites: slice) -> int:
    """Return the place in an adapter's table of the region of sites that share an input."""
    return layer * LAYER_ENTRIES + _REGIONS_AT + _GROUPS.index(sites) * REGION_ENTRIES


@dataclass(frozen=True)
class LowRankSite:
    """The update of one linear layer; its scale is in `b`. `factor_O`, float32, multiplies the result."""

    a_RK: torch.Tensor
    b: torch.Tensor
    factor_O: torch.Tensor | None = None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All that it holds, by the fields' names."""
        own = {"a_RK": self.a_RK, "b": self.b}
        return own if self.factor_O is None else own | {"factor_O": self.factor_O}

    @property
    def entries(self) -> list[int]:
        """The numbers that describe it."""
        check_blocks(self.b)
        factor = 0 if self.factor_O is None else self.factor_O.data_ptr()
        return [self.a_RK.data_ptr(), self.b.data_ptr(), self.a_RK.shape[0], factor]

    def add_to(self, out_NO: torch.Tensor, x_NK: torch.Tensor) -> None:
        """Add the update to a layer's results, in place."""
        out_NO += times_blocks(torch.mm(x_NK, self.a_RK.t()), self.b, out_NO.shape[1])
        if self.factor_O is not None:
            out_NO.mul_(self.factor_O)


@dataclass(frozen=True)
class BottleneckSite:
    """A bottleneck on the result of a half of a block; biases are float32."""

    down_MD: torch.Tensor
    down_M: torch.Tensor
    up: torch.Tensor
    up_D: torch.Tensor
    activation: str
    is_parallel: bool

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All that it holds, by the fields' names."""
        return {"down_MD": self.down_MD, "down_M": self.down_M, "up": self.up, "up_D": self.up_D}

    @property
    def entries(self) -> list[int]:
        """The numbers that describe it."""
        check_blocks(self.up)
        tensors = (self.down_MD, self.down_M, self.up, self.up_D)
        kind = ACTIVATIONS[self.activation]
        return [*(one.data_ptr() for one in tensors), self.down_MD.shape[0], kind, int(self.is_parallel)]

    def add_to(self, out_ND: torch.Tensor, input_ND: torch.Tensor) -> None:
        """Add the update to a half's results, in place."""
        x_ND = input_ND if self.is_parallel else out_ND
        middle_NM = torch.mm(x_ND, self.down_MD.t()).float() + self.down_M
        act = torch.tanh if self.activation == "tanh" else getattr(functional, self.activation)
        product_ND = times_blocks(act(middle_NM).to(out_ND.dtype), self.up, out_ND.shape[1])
        change_ND = product_ND.float() + self.up_D
        out_ND.copy_(out_ND.float() + change_ND)


def _region_of(sites: Sequence[LowRankSite]) -> list[int]:
    """Return where sites' numbers begin and how many bytes they are, if they are together: else a part."""
    if not sites:
        return [0, 0]
    begin = end = sites[0].a_RK.data_ptr()
    for part in (part for site in sites for part in (site.a_RK, site.b)):
        if not 0 <= part.data_ptr() - end < _MOST_BETWEEN:
            break
        end = part.data_ptr() + part.nbytes
    return [begin, end - begin]


@dataclass(frozen=True, eq=False)
class AdapterDescriptor:
    """An adapter in memory: per layer its seven sites and two bottlenecks, None where there is none.

    `address` is that of its table.
    """

    low_ranks: Sequence[Sequence[LowRankSite | None]]
    bottlenecks: Sequence[Sequence[BottleneckSite | None]]
    table: torch.Tensor = field(init=False)
    address: int = field(init=False)
    has_low_ranks: bool = field(init=False)
    has_bottlenecks: bool = field(init=False)
    max_rank: int = field(init=False)

    def __post_init__(self) -> None:
        entries: list[int] = []
        for sites, bottlenecks in zip(self.low_ranks, self.bottlenecks, strict=True):
            for site in sites:
                entries += [0] * SITE_ENTRIES if site is None else site.entries
            for one in bottlenecks:
                entries += [0] * BOTTLENECK_ENTRIES if one is None else one.entries
            for group in _GROUPS:
                entries += _region_of([site for site in sites[group] if site is not None])
        object.__setattr__(self, "table", torch.tensor(entries, dtype=torch.int64))
        object.__setattr__(self, "address", self.table.data_ptr())
        object.__setattr__(self, "has_low_ranks", any(map(any, self.low_ranks)))
        object.__setattr__(self, "has_bottlenecks", any(map(any, self.bottlenecks)))
        ranks = [site.a_RK.shape[0] for sites in self.low_ranks for site in sites if site is not None]
        object.__setattr__(self, "max_rank", max(ranks, default=0))

    def add_low_ranks_to(
        self, out_NO: torch.Tensor, x_NK: torch.Tensor, layer: int, sites: slice, widths: Sequence[int]
    ) -> None:
        """Add the updates of layers that share an input, side by side, to their results, in place."""
        begin = 0
        for number in range(sites.start, sites.stop):
            end = begin + widths[number]
            site = self.low_ranks[layer][number]
            if site is not None:
                site.add_to(out_NO[:, begin:end], x_NK)
            begin = end


class Pages:
    """Keys and values of all layers in pages of `PAGE_SIZE` tokens, [layers, pages, H, S, C] each."""

    def __init__(
        self, *, num_layers: int, num_pages: int, num_kv_heads: int, head_size: int, like: torch.Tensor
    ) -> None:
        shape = (num_layers, num_pages, num_kv_heads, PAGE_SIZE, head_size)
        # Untouched memory costs nothing until a page is used for the first time.
        self.keys = like.new_empty(shape)
        self.values = like.new_empty(shape)

    @property
    def num_pages(self) -> int:
        """How many pages there are."""
        return int(self.keys.shape[1])

    @property
    def page_bytes(self) -> int:
        """Memory of one page, of all layers."""
        return (self.keys.nbytes + self.values.nbytes) // self.num_pages

    def discard(self, pages: Sequence[int]) -> None:
        """Give the memory of pages back, until they are written again."""
        for whole in (self.keys, self.values):
            discard(whole, pages)

    def gather(self, layer: int, pages: torch.Tensor, num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values of the first tokens of a row, each [H, tokens, C]."""
        keys, values = (
            whole[layer, pages].transpose(0, 1).flatten(1, 2)[:, :num_tokens]
            for whole in (self.keys, self.values)
        )
        return keys, values

    def write(
        self, pages: torch.Tensor, slots: torch.Tensor, keys_TLHC: torch.Tensor, values_TLHC: torch.Tensor
    ) -> None:
        """Put tokens' keys and values of all layers at their pages and places in them."""
        self.keys[:, pages, :, slots] = keys_TLHC
        self.values[:, pages, :, slots] = values_TLHC

    def read(self, pages: Sequence[int], num_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a copy of the keys and values of a row's first tokens, each [tokens, layers, H, C]."""
        own = torch.tensor(pages)
        # [layers, pages, H, S, C]
        found = (whole[:, own].permute(1, 3, 0, 2, 4).flatten(0, 1) for whole in (self.keys, self.values))
        keys, values = (part[:num_tokens].clone() for part in found)
        return keys, values


@dataclass(frozen=True, eq=False)
class TokenRows:
    """Tokens and their places in their sequences: positions, and pages, filled up with 0 to one length.

    All are put into their pages; the first `num_attending` attend by themselves, the others all at once by
    sequence. `are_alone` says that no two are of one sequence.
    """

    positions_N: torch.Tensor
    pages_NW: torch.Tensor
    num_attending: int
    are_alone: bool

    def __len__(self) -> int:
        return len(self.positions_N)


@dataclass(frozen=True, eq=False)
class SingleRows:
    """The adapters of rows of one token each, which are a step's first M.

    `table_M`, int64, holds the addresses of their tables, in memory of its own unless some is given.
    """

    adapters: Sequence[AdapterDescriptor | None]
    memory_M: InitVar[torch.Tensor | None] = None
    table_M: torch.Tensor = field(init=False)
    has_low_ranks: bool = field(init=False)
    has_bottlenecks: bool = field(init=False)

    def __post_init__(self, memory_M: torch.Tensor | None) -> None:
        addresses = [0 if one is None else one.address for one in self.adapters]
        table_M = torch.tensor(addresses, dtype=torch.int64)
        if memory_M is not None:
            table_M = memory_M.copy_(table_M)
        object.__setattr__(self, "table_M", table_M)
        object.__setattr__(self, "has_low_ranks", any(one and one.has_low_ranks for one in self.adapters))
        object.__setattr__(self, "has_bottlenecks", any(one and one.has_bottlenecks for one in self.adapters))

    def __len__(self) -> int:
        return len(self.adapters)


@dataclass(frozen=True, eq=False)
class ChunkRows:
    """The adapters of a step's chunks, and the step's tokens that each is.

    `table_S3`, int64, has those whose low-rank updates a kernel can add: address, first token, tokens.
    `places_S3` has all: first token, tokens, and the first one's position in its sequence.
    """

    adapters: Sequence[AdapterDescriptor | None]
    tokens: Sequence[slice]
    positions: Sequence[int]
    table_S3: torch.Tensor = field(init=False)
    places_S3: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        rows = [
            (one.address, tokens.start, tokens.stop - tokens.start)
            for one, tokens in zip(self.adapters, self.tokens, strict=True)
            if one is not None and 0 < one.max_rank <= PREFILL_RANK
        ]
        object.__setattr__(self, "table_S3", torch.tensor(rows, dtype=torch.int64).view(-1, 3))
        places = [
            (tokens.start, tokens.stop - tokens.start, position)
            for tokens, position in zip(self.tokens, self.positions, strict=True)
        ]
        object.__setattr__(self, "places_S3", torch.tensor(places, dtype=torch.int64).view(-1, 3))

    def add_low_ranks(
        self,
        out_NO: torch.Tensor,
        x_NK: torch.Tensor,
        layer: int,
        sites: slice,
        widths: Sequence[int],
        *,
        min_rank: int = 1,
    ) -> None:
        """Add the updates of all adapters of a rank or more to their tokens, in place."""
        for adapter, tokens in zip(self.adapters, self.tokens, strict=True):
            if adapter is not None and adapter.max_rank >= min_rank:
                adapter.add_low_ranks_to(out_NO[tokens], x_NK[tokens], layer, sites, widths)


@dataclass(frozen=True)
class HeadShape:
    """The order of q, k and v side by side, the turning of every position, float32 [positions, C/2], and the
    norms' epsilon."""

    num_heads: int
    num_kv_heads: int
    size: int
    cosine_TC: torch.Tensor
    sine_TC: torch.Tensor
    epsilon: float

    @property
    def widths(self) -> tuple[int, int, int]:
        """Columns of q, k and v."""
        return self.num_heads * self.size, self.num_kv_heads * self.size, self.num_kv_heads * self.size


def turn(heads: torch.Tensor, positions_N: torch.Tensor, shape: HeadShape) -> torch.Tensor:
    """Turn queries or keys by their positions (Su et al. 2021, arXiv 2104.09864).

    Args:
        heads: [N, heads, C].
        positions_N: int64, on the same device.

    Returns:
        The same shape and type.
    """
    cosine, sine = (table[positions_N][:, None] for table in (shape.cosine_TC, shape.sine_TC))
    low, high = heads.float().chunk(2, dim=-1)
    return torch.cat([low * cosine - high * sine, high * cosine + low * sine], dim=-1).to(heads.dtype)


def token_rows(
    places: Sequence[tuple[int, int, Sequence[int]]],
    *,
    num_attending: int,
    are_alone: bool,
) -> TokenRows:
    """Return the tokens of some chunks, one chunk after the other.

    Args:
        places: of each chunk the position of its first token, its tokens, and its sequence's pages.
        num_attending: tokens that attend by themselves.
        are_alone: whether each chunk is one token.
    """
    num_tokens = sum(count for _, count, _ in places)
    widths = [-(-(first + count) // PAGE_SIZE) for first, count, _ in places]
    positions_N = np.empty(num_tokens, dtype=np.int64)
    pages_NW = np.zeros((num_tokens, max(widths, default=1)), dtype=np.int64)
    row = 0
    for (first, count, pages), width in zip(places, widths, strict=True):
        positions_N[row : row + count] = np.arange(first, first + count)
        pages_NW[row : row + count, :width] = pages[:width]
        row += count
    return TokenRows(torch.from_numpy(positions_N), torch.from_numpy(pages_NW), num_attending, are_alone)
