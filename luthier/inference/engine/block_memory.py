"""Memory of a runner's blocks, and how much of it can be given to others. No tensors."""

from luthier.inference.engine.block_pool import BlockPool
from luthier.modeling.protocols import ModelRunner


class BlockMemory:
    """Blocks that were never used have no memory yet, unless the runner allocates all at once."""

    def __init__(self, runner: ModelRunner, pool: BlockPool) -> None:
        self._runner, self._pool, self._limits = runner, pool, runner.limits
        # Without these an answer of any length might fail.
        self._num_least = min(pool.num_blocks, -(-self._limits.context_length // self._limits.block_size) + 1)

    @property
    def growing_bytes(self) -> int:
        """Memory of blocks that have none yet and may take some."""
        return 0 if self._limits.allocates_at_once else self._pool.num_growing * self._limits.block_bytes

    @property
    def spare_bytes(self) -> int:
        """Memory of unused blocks, and of growth, beyond what one answer of full length needs."""
        if self._limits.allocates_at_once:
            return 0
        num_used = self._pool.num_warm - self._pool.num_unused
        num_spare = min(self._pool.num_free, self._pool.num_free + num_used - self._num_least)
        return max(0, num_spare) * self._limits.block_bytes

    def limit(self, num_bytes: int) -> None:
        """Limit the memory of unused blocks, beside what one answer of full length needs.

        Args:
            num_bytes: as `spare_bytes` counts them.
        """
        if self._limits.allocates_at_once:
            return
        num_used = self._pool.num_warm - self._pool.num_unused
        num_blocks = max(num_used, self._num_least) + num_bytes // self._limits.block_bytes
        self._runner.discard_blocks(self._pool.limit_warm(num_blocks))
