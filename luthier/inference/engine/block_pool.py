"""Allocates blocks of keys and values, and finds cached prefixes. Numbers only, no tensors.

A full block is identified by the model, all tokens before it, and its own. A sequence with the same prefix
shares it; a block without users stays cached until it is needed for another sequence.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

# A block's content: the number of the content before it (or the model), and its own tokens.
_Content = tuple[Hashable, tuple[int, ...]]


@dataclass(eq=False)
class BlockTable:
    """The blocks of one sequence; `prefix` identifies what its first `num_cached` hold, None if unknown."""

    prefix: Hashable
    blocks: list[int] = field(default_factory=list)
    num_cached: int = 0


class BlockPool:
    """Allocates blocks of `block_size` tokens by number."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self._block_size = block_size
        # Blocks without content; those that have no memory yet are allocated last, the lowest numbers first.
        self._blank: list[int] = []
        self._cold = list(range(num_blocks - 1, -1, -1))
        self._max_warm = num_blocks
        self._num_users = [0] * num_blocks
        self._by_content: dict[_Content, int] = {}
        self._content_of: dict[int, _Content] = {}
        self._number_of: dict[int, int] = {}
        self._next_number = 0
        # Unused blocks whose content is known, least recently used first.
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return self.num_unused + self.num_growing

    @property
    def num_unused(self) -> int:
        """Blocks that have memory and no user."""
        return len(self._blank) + len(self._idle)

    @property
    def num_warm(self) -> int:
        """Blocks that have memory."""
        return self.num_blocks - len(self._cold)

    @property
    def num_growing(self) -> int:
        """Blocks without memory that may be given some."""
        return max(0, self._max_warm - self.num_warm)

    def limit_warm(self, max_warm: int) -> list[int]:
        """Limit the blocks with memory, and return those to discard; blocks in use keep theirs."""
        self._max_warm = min(max_warm, self.num_blocks)
        cooled: list[int] = []
        while self.num_warm > self._max_warm and self.num_unused:
            block = self._blank.pop() if self._blank else self._evict()
            self._cold.append(block)
            cooled.append(block)
        return cooled

    def start(self, model: Hashable, tokens: Sequence[int], *, owner: str = "") -> BlockTable:
        """Begin a sequence with the cached blocks of its longest known prefix.

        Args:
            model: what decides keys and values beside the tokens.
            tokens: the sequence; its last token is left to be run.
            owner: blocks are shared only between sequences of the same owner.
        """
        table = BlockTable((model, owner))
        for end in range(self._block_size, len(tokens), self._block_size):
            content = (table.prefix, tuple(tokens[end - self._block_size : end]))
            block = self._by_content.get(content)
            if block is None:
                break
            self._num_users[block] += 1
            self._idle.pop(block, None)
            table.blocks.append(block)
            table.prefix = self._number_of[block]
            table.num_cached += 1
        return table

    def extend(self, table: BlockTable, num_tokens: int) -> bool:
        """Allocate blocks for a total number of tokens; False when there are too few: nothing changes."""
        missing = -(-num_tokens // self._block_size) - len(table.blocks)
        if missing <= 0:
            return True
        if missing > self.num_free:
            return False
        for _ in range(missing):
            block = self._next_free()
            self._num_users[block] = 1
            table.blocks.append(block)
        return True

    def cache_full_blocks(self, table: BlockTable, tokens: Sequence[int], num_done: int) -> None:
        """Make the blocks that are full by now available to later sequences with the same prefix."""
        while table.prefix is not None and (table.num_cached + 1) * self._block_size <= num_done:
            begin = table.num_cached * self._block_size
            content = (table.prefix, tuple(tokens[begin : begin + self._block_size]))
            block = table.blocks[table.num_cached]
            if content in self._by_content:
                # Another sequence has cached the same tokens meanwhile: blocks after these can't be cached.
                table.prefix = None
                return
            self._by_content[content] = block
            self._content_of[block] = content
            self._number_of[block] = self._next_number
            table.prefix = self._next_number
            self._next_number += 1
            table.num_cached += 1

    def release(self, table: BlockTable) -> None:
        """Free a sequence's blocks; those whose content is known stay cached until they are needed."""
        # The last first: a block is evicted after those that follow it.
        for block in reversed(table.blocks):
            self._num_users[block] -= 1
            if self._num_users[block] > 0:
                continue
            if block in self._content_of:
                self._idle[block] = None
            else:
                self._blank.append(block)
        table.blocks.clear()

    def forget(self, model: Hashable) -> None:
        """Drop a model's cached blocks; its key may later stand for other weights."""
        gone: set[Hashable] = set()
        # A block's number is higher than that of the block before it, so that one pass in order finds all.
        for block in sorted(self._number_of, key=self._number_of.__getitem__):
            before = self._content_of[block][0]
            if before in gone or (isinstance(before, tuple) and before[0] == model):
                gone.add(self._number_of[block])
                self._uncache(block)
                if block in self._idle:
                    del self._idle[block]
                    self._blank.append(block)

    def _next_free(self) -> int:
        if self._blank:
            return self._blank.pop()
        return self._cold.pop() if self.num_growing else self._evict()

    def _evict(self) -> int:
        block, _ = self._idle.popitem(last=False)
        self._uncache(block)
        return block

    def _uncache(self, block: int) -> None:
        del self._by_content[self._content_of.pop(block)]
        del self._number_of[block]
