"""The seam to what runs a model: all that a runner has to know.

A runner holds one set of weights, a base's or a fully tuned model's, with the adapters on it, and keys and
values in blocks. Which sequence has which blocks, and what runs next, is for the engine to say.

Legend: L layers, R rows of logits, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from luthier.core.errors import LuthierError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from luthier.methods import ServedParts

# What a runner calls an adapter; the engine only passes it back.
AdapterId = int


class UnsupportedAdapterError(LuthierError):
    """A runner has no place for an adapter's rank or layers; `reference` serves it instead."""


@dataclass(frozen=True, eq=False)
class LoadedWeights:
    """A model in evaluation mode, which belongs to its runner from now on, and the folder of its files."""

    model: "PreTrainedModel"
    folder: Path


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a runner may hold.

    Attributes:
        max_cache_tokens: whose keys and values are in memory at once.
        max_sequences: of one batch.
        max_draft_tokens: of one sequence in a batch; 0: no speculative decoding.
    """

    max_cache_tokens: int
    max_sequences: int
    max_draft_tokens: int = 0


@dataclass(frozen=True)
class RunnerLimits:
    """What a runner can do, fixed when it is loaded.

    Attributes:
        dtype: of weights, keys and values, as torch names it.
        context_length: positions of a sequence, virtual tokens included.
        block_size: tokens whose keys and values one block holds, in all layers.
        block_bytes: memory of a block once it is used.
        max_sequences: chunks of one batch.
        max_prefill_tokens: tokens of the batch's chunks that have more than one token, in all.
        max_logit_rows: rows of logits of one batch.
        mixes_adapters: whether a batch may hold chunks of different adapters; else all have the same.
        short_prompt_tokens: of a prompt, or of the rest of one, that run as one chunk.
        long_chunk_tokens: of a chunk of a longer prompt, for whose end the other sequences wait.
        max_chunk_pairs: of a token and one that it attends to, in such a chunk; it has 16 tokens at least.
        max_draft_tokens: draft tokens that one sequence may verify in a batch; 0: no speculation.
        allocates_at_once: whether all blocks have memory from the start; unused ones then give none back.
    """

    dtype: str
    vocabulary_size: int
    context_length: int
    block_size: int
    num_blocks: int
    block_bytes: int
    max_sequences: int
    max_prefill_tokens: int
    max_logit_rows: int
    mixes_adapters: bool = True
    short_prompt_tokens: int = 64
    long_chunk_tokens: int = 32
    max_chunk_pairs: int = 1 << 16
    max_draft_tokens: int = 0
    allocates_at_once: bool = False


@dataclass(eq=False, slots=True)
class TokenChunk:
    """Tokens of one sequence that run in one batch. Not frozen: frozen ones take twice as long to make.

    Attributes:
        token_ids: `-1 - i` is the adapter's virtual token `i`, whose keys and values the runner makes.
        first_position: of the first token; keys and values of all before it are in the blocks.
        block_table: the sequence's blocks from position 0 on, up to that of the chunk's last token at least.
        adapter: None for the bare weights.
        logits_from: the place in `token_ids` from which on logits are wanted; its length for none.
        num_draft_tokens: of the last tokens, those that are drafts.
    """

    token_ids: Sequence[int]
    first_position: int
    block_table: Sequence[int]
    adapter: AdapterId | None
    logits_from: int
    num_draft_tokens: int = 0

    @property
    def num_logit_rows(self) -> int:
        """Rows of logits that it gets."""
        return len(self.token_ids) - self.logits_from


@dataclass(frozen=True, eq=False)
class ScheduledBatch:
    """What runs next: at most one chunk of each sequence."""

    chunks: Sequence[TokenChunk]


@dataclass(frozen=True, eq=False)
class AdapterSource:
    """A verified artifact of a method that does not replace the weights.

    Attributes:
        folder: its files.
        parts: the same, read; None where only the method itself can attach it.
    """

    folder: Path
    parts: "ServedParts | None"


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter on a runner; `num_virtual_tokens` precede every sequence of it."""

    adapter: AdapterId
    num_virtual_tokens: int
    num_bytes: int


class Logits(Protocol):
    """Logits of a batch, of its chunks' wanted rows in order; valid until the runner's next `execute`."""

    def greedy(self) -> list[int]:
        """Return the likeliest token of each row, of equals the first; -1 where a row is not finite."""

    def draw(
        self,
        rows: Sequence[int],
        *,
        temperatures: Sequence[float],
        top_p: Sequence[float],
        points: Sequence[float],
    ) -> list[int | None]:
        """Draw a token of each of some rows, at points of [0, 1) of its mass; None: the engine samples it."""

    def rows(self, rows: Sequence[int]) -> "torch.Tensor":
        """Return some rows, float32 [R, V], on the runner's device."""


class ModelRunner(Protocol):
    """One set of weights that answers. Called by one thread."""

    limits: RunnerLimits

    def prepare_adapter(self, source: AdapterSource) -> AdapterSource:
        """Return a source that `add_adapter` takes at once. Any thread may call it, beside `execute`.

        Raises:
            ArtifactCorruptError: when it does not fit the weights.
            UnsupportedAdapterError: when this runner has no place for it.
        """

    def add_adapter(self, source: AdapterSource) -> AdapterInfo:
        """Put an adapter beside the weights, prepared where it is not yet.

        Raises:
            ArtifactCorruptError: when it does not fit the weights.
            UnsupportedAdapterError: when this runner has no place for it.
        """

    def remove_adapter(self, adapter: AdapterId) -> None:
        """Free an adapter that no sequence uses."""

    def execute(self, batch: ScheduledBatch, on_launch: Callable[[], None] | None = None) -> Logits:
        """Run a batch: write keys and values of its tokens into their blocks, return the wanted logits.

        Args:
            on_launch: called when all is prepared, right before the long work without the interpreter's lock.
        """

    def discard_blocks(self, blocks: Sequence[int]) -> None:
        """Give the memory of unused blocks back, where they are not allocated at once."""

    def set_num_threads(self, count: int) -> None:
        """Set the number of threads; nothing on CUDA."""

    def close(self) -> None:
        """Free the weights and all adapters."""


class RunnerProvider(Protocol):
    """Loads runners of one kind. The entry point group `luthier.runners` names its class, called without
    arguments."""

    def refusal(self, model: "PreTrainedModel") -> str | None:
        """Return why this runner can't run a model in its type on its device; None when it can.

        Args:
            model: may be on the meta device.
        """

    def load(self, weights: LoadedWeights, budget: Budget) -> ModelRunner:
        """Load a model that is not refused."""
