"""The memory that a lane's pages take, and how much of it may be given to others."""

from luthier.inference.engine.block_pool import PagePool
from luthier.modeling.kernels.served_rows import PAGE_SIZE
from luthier.modeling.packed_llama import PackedLlama


class LaneMemory:
    """Pages of a base, of which those that were never used have no memory yet where the system can do so."""

    def __init__(self, model: PackedLlama, pool: PagePool) -> None:
        self._pages, self._pool = model.pages, pool
        # On a GPU all pages have memory from the start.
        self._is_allocated = model.device.type != "cpu"
        # Without these an answer of any length might fail.
        self._num_least = min(pool.num_pages, -(-model.context_length // PAGE_SIZE) + 1)

    @property
    def growing_bytes(self) -> int:
        """Memory of pages that have none yet, and may take some."""
        return 0 if self._is_allocated else self._pool.num_growing * self._pages.page_bytes

    @property
    def spare_bytes(self) -> int:
        """Memory of pages that nobody uses, with what they may grow by, beyond what one long answer needs."""
        if self._is_allocated:
            return 0
        num_used = self._pool.num_warm - self._pool.num_unused
        num_spare = min(self._pool.num_free, self._pool.num_free + num_used - self._num_least)
        return max(0, num_spare) * self._pages.page_bytes

    def limit(self, num_bytes: int) -> None:
        """Let pages that nobody uses take no more than so much, beside what one long answer needs.

        Args:
            num_bytes: as `spare_bytes` counts them.
        """
        if self._is_allocated:
            return
        num_used = self._pool.num_warm - self._pool.num_unused
        num_pages = max(num_used, self._num_least) + num_bytes // self._pages.page_bytes
        self._pages.discard(self._pool.limit_warm(num_pages))
