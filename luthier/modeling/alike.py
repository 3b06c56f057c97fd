"""Adapters whose files are alike: how one lies in memory is worked out once, and done again for the others.

Models that were tuned by one recipe have files with the same header and configuration. Their numbers go from
the same places of their file to the same places of their memory, and to find these takes many times as long
as to move the numbers.
"""

import threading
from collections.abc import Callable, Hashable, Sequence

import torch

from luthier.methods._served import ServedParts
from luthier.modeling.kernels.laying import are_laid_by_kernel, facts_of, lay_facts
from luthier.modeling.kernels.served_rows import Described, LowRankSite
from luthier.modeling.packed_adapter import PackedAdapter, updates_of
from luthier.modeling.packed_llama import PackedLlama

# Recipes that a base's adapters are tuned by at a time.
_MOST_LAYOUTS = 16
_FROM_FILE, _FROM_MEMORY = slice(0, 2), slice(2, 4)

# Where a tensor begins in memory, and its shape.
_Place = tuple[int, tuple[int, ...]]


class Layout:
    """Where the numbers of adapters with files that are alike come from, and where they go.

    Args:
        facts_UF: of the updates (kernels/laying.py), addresses counted from where file and memory begin.
        table: the adapter's table, addresses counted likewise.
        is_address: which of the table's numbers are addresses.
        places: of each layer's sites, where `a` and `b` lie in memory.
        num_bytes: the memory.
        dtype: of the numbers there.
    """

    def __init__(
        self,
        facts_UF: torch.Tensor,
        table: torch.Tensor,
        is_address: torch.Tensor,
        places: Sequence[Sequence[tuple[_Place, _Place] | None]],
        num_bytes: int,
        dtype: torch.dtype,
    ) -> None:
        self._facts_UF, self._table, self._is_address = facts_UF, table, is_address
        self._places, self._num_bytes, self._dtype = places, num_bytes, dtype
        self._max_rank = int(facts_UF[:, 5].max())

    @classmethod
    def of(cls, parts: ServedParts, laid: PackedAdapter, base: PackedLlama, file: range) -> "Layout | None":
        """Return how an adapter was laid out.

        Args:
            parts: its parts, which lie in a file's memory.
            laid: what was made of them.
            base: the base beside which it lies.
            file: the addresses of the file's memory.

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
        sources = facts_UF[:, _FROM_FILE]
        are_there = bool(((sources >= file.start) & (sources < file.stop)).all())
        if not (are_laid_by_kernel(updates) and are_there):
            return None
        tensors = [one for update in updates for one in (update.a_FK, update.blocks)]
        begin = min(one.data_ptr() for one in tensors)
        num_bytes = max(one.data_ptr() + one.nbytes for one in tensors) - begin
        facts_UF[:, _FROM_FILE] -= file.start
        facts_UF[:, _FROM_MEMORY] -= begin
        table = laid.described.table
        is_address = ((table >= begin) & (table < begin + num_bytes)).long()

        def places_of(site: LowRankSite | None) -> tuple[_Place, _Place] | None:
            if site is None:
                return None
            first, second = ((one.data_ptr() - begin, tuple(one.shape)) for one in (site.a_RK, site.b))
            return first, second

        places = [[places_of(site) for site in sites] for sites in laid.described.low_ranks]
        return cls(facts_UF, table - begin * is_address, is_address, places, num_bytes, base.dtype)

    def lay(self, file: int, take_memory: Callable[[int], torch.Tensor]) -> tuple[PackedAdapter, bool]:
        """Lay an adapter out from a file that is like the one whose layout this is. Any thread may call it.

        Args:
            file: the address of the file's memory.
            take_memory: gives so many bytes, at a multiple of 64.

        Returns:
            The adapter, and whether all of its numbers are finite.
        """
        memory = take_memory(self._num_bytes)
        facts_UF = self._facts_UF.clone()
        facts_UF[:, _FROM_FILE] += file
        facts_UF[:, _FROM_MEMORY] += memory.data_ptr()
        are_finite = lay_facts(facts_UF, self._dtype)
        table = self._table + memory.data_ptr() * self._is_address
        sites = _Sites(self._places, memory, self._dtype)
        return PackedAdapter(Described.at(table, sites, self._max_rank)), are_finite


class _Sites(Sequence[Sequence[LowRankSite | None]]):
    """The sites of an adapter by layer, made when they are asked for: kernels read the table alone."""

    def __init__(
        self,
        places: Sequence[Sequence[tuple[_Place, _Place] | None]],
        memory: torch.Tensor,
        dtype: torch.dtype,
    ) -> None:
        self._places, self._memory, self._dtype = places, memory, dtype

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, layer):  # type: ignore[no-untyped-def]
        return [None if one is None else LowRankSite(*map(self._tensor, one)) for one in self._places[layer]]

    def _tensor(self, place: _Place) -> torch.Tensor:
        begin, shape = place
        num_bytes = torch.Size(shape).numel() * self._dtype.itemsize
        return self._memory[begin : begin + num_bytes].view(self._dtype).view(shape)


class Layouts:
    """Those that the adapters of one base had lately; any thread may call it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._found: dict[Hashable, Layout] = {}

    def find(self, key: Hashable) -> Layout | None:
        """Return the layout of adapters that are alike in a key, None where none is known."""
        with self._lock:
            return self._found.get(key)

    def keep(self, key: Hashable, layout: Layout) -> None:
        """Keep a layout; the one that was kept first is forgotten where there are too many."""
        with self._lock:
            self._found[key] = layout
            if len(self._found) > _MOST_LAYOUTS:
                del self._found[next(iter(self._found))]
