"""Adapters whose files are alike: how one lies in memory is worked out once, and done again for the others.

Models that were tuned by one recipe have files with the same header and configuration. Their numbers go from
the same places of their file to the same places of their memory, and to find these takes many times as long
as to move the numbers.

Legend: U updates, F facts of an update (kernels/laying.py).
"""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import overload

import torch

from luthier.methods._served import ServedParts
from luthier.modeling.kernels.laying import FILLED, FROM, TO, are_laid_by_kernel, facts_of, lay_facts
from luthier.modeling.kernels.served_rows import Described, LowRankSite
from luthier.modeling.packed_adapter import PackedAdapter, updates_of
from luthier.modeling.packed_llama import PackedLlama

# Recipes that a base's adapters are tuned by at a time.
_MOST_LAYOUTS = 16

# Where a tensor begins in memory, and its shape.
_Place = tuple[int, tuple[int, ...]]


class Layout:
    """Where the numbers of adapters with files that are alike come from, and where they go.

    Args:
        facts_UF: int64, of the updates, addresses counted from where file and memory begin.
        places: of each layer's sites, where `a` and `b` lie in memory.
    """

    def __init__(
        self,
        file_bytes: int,
        facts_UF: torch.Tensor,
        table: torch.Tensor,
        is_address: torch.Tensor,
        places: Sequence[Sequence[tuple[_Place, _Place] | None]],
        num_bytes: int,
        dtype: torch.dtype,
    ) -> None:
        self._file_bytes = file_bytes
        self._facts_UF, self._table, self._is_address = facts_UF, table, is_address
        self._places, self._num_bytes, self._dtype = places, num_bytes, dtype
        self._max_rank = int(facts_UF[:, FILLED].max())

    @classmethod
    def of(cls, parts: ServedParts, laid: PackedAdapter, base: PackedLlama, file: range) -> "Layout | None":
        """Return how an adapter was laid out.

        Returns:
            The layout; None where more is to be done than to move the numbers of updates.
        """
        updates = updates_of(parts, laid, base)
        has_others = laid.num_virtual_tokens or parts.bottlenecks
        if (
            has_others
            or laid.described is None
            or any(one.magnitude_O is not None for one in parts.low_ranks)
        ):
            return None
        facts_UF = torch.tensor([facts_of(update) for update in updates])
        sources = [one for update in updates for one in (update.a_RK, update.b_OR)]
        are_there = all(
            file.start <= one.data_ptr() and one.data_ptr() + one.nbytes <= file.stop for one in sources
        )
        if not (are_laid_by_kernel(updates) and are_there):
            return None
        tensors = [one for update in updates for one in (update.a_FK, update.blocks)]
        begin = min(one.data_ptr() for one in tensors)
        num_bytes = max(one.data_ptr() + one.nbytes for one in tensors) - begin
        facts_UF[:, FROM] -= file.start
        facts_UF[:, TO] -= begin
        table = laid.described.table
        is_address = ((table >= begin) & (table < begin + num_bytes)).long()

        def places_of(site: LowRankSite | None) -> tuple[_Place, _Place] | None:
            if site is None:
                return None
            first, second = ((one.data_ptr() - begin, tuple(one.shape)) for one in (site.a_RK, site.b))
            return first, second

        places = [[places_of(site) for site in sites] for sites in laid.described.low_ranks]
        table = table - begin * is_address
        return cls(len(file), facts_UF, table, is_address, places, num_bytes, base.dtype)

    def lay(self, file: range, take_memory: Callable[[int], torch.Tensor]) -> tuple[PackedAdapter, bool]:
        """Lay an adapter out from a file that is like the one whose layout this is. Any thread may call it.

        Args:
            file: the addresses of the file's memory, which stays until this returns.
            take_memory: gives so many bytes, at a multiple of 64.

        Returns:
            The adapter, and whether all of its numbers are finite.

        Raises:
            ValueError: when the file has another length.
        """
        if len(file) != self._file_bytes:
            raise ValueError("An adapter is laid out as one whose file was as long.")
        memory = take_memory(self._num_bytes)
        facts_UF = self._facts_UF.clone()
        facts_UF[:, FROM] += file.start
        facts_UF[:, TO] += memory.data_ptr()
        are_finite = lay_facts(facts_UF, self._dtype)
        table = self._table + memory.data_ptr() * self._is_address
        sites = _Sites(self._places, memory, self._dtype)
        return PackedAdapter(Described.at(table, sites, self._max_rank)), are_finite


class _Sites(Sequence[Sequence[LowRankSite | None]]):
    """The sites of an adapter by layer, made when they are first asked for: kernels read the table alone."""

    def __init__(
        self,
        places: Sequence[Sequence[tuple[_Place, _Place] | None]],
        memory: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        self._places, self._memory, self._dtype = places, memory, dtype
        self._made: dict[int, Sequence[LowRankSite | None]] = {}

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, layer: int) -> Sequence[LowRankSite | None]: ...

    @overload
    def __getitem__(self, layer: slice) -> Sequence[Sequence[LowRankSite | None]]: ...

    def __getitem__(
        self, layer: int | slice
    ) -> Sequence[LowRankSite | None] | Sequence[Sequence[LowRankSite | None]]:
        if isinstance(layer, slice):
            return [self[number] for number in range(*layer.indices(len(self)))]
        found = self._made.get(layer)
        if found is None:
            found = [
                None if one is None else LowRankSite(*map(self._tensor, one)) for one in self._places[layer]
            ]
            self._made[layer] = found
        return found

    def _tensor(self, place: _Place) -> torch.Tensor:
        begin, shape = place
        num_bytes = torch.Size(shape).numel() * self._dtype.itemsize
        return self._memory[begin : begin + num_bytes].view(self._dtype).view(shape)


class Layouts:
    """Those that the adapters of one base had lately; any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: OrderedDict[Hashable, Layout] = OrderedDict()

    def find(self, key: Hashable) -> Layout | None:
        """Return the layout of adapters that are alike in a key, None where none is known."""
        with self._lock:
            if key in self._found:
                self._found.move_to_end(key)
            return self._found.get(key)

    def keep(self, key: Hashable, layout: Layout) -> None:
        """Keep a layout; the one that was not asked for for longest leaves where there are too many."""
        with self._lock:
            self._found[key] = layout
            if len(self._found) > _MOST_LAYOUTS:
                self._found.popitem(last=False)
