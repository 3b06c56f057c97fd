"""Steps of a packed base as programs of compiled kernels.

A step is some three hundred kernels. Launched one by one from Python they cost as much as a third of the
work, and each may wait for Python's lock; as a program they are one call. Steps of single rows are written
down once: what changes from one to the next, tokens, places and adapters, is at addresses that stay. Those
with chunks are written down each time, which between kernels would take twice as long.

Legend: M rows of one token each, W pages of the longest sequence, V vocabulary.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from luthier_cpu.codegen import kernels
from luthier_cpu.codegen.openmp import Program, recording
from luthier_cpu.decode.batch import Buffers, Chunk, StepInputs
from luthier_cpu.decode.batch_layout import (
    PAGE_SIZE,
    PREFILL_RANK,
    AdapterDescriptor,
    SingleRows,
    TokenRows,
)
from luthier_cpu.decode.sampling import Logits, find_best

if TYPE_CHECKING:
    from luthier_cpu.decode.llama import PackedLlama

# Rows of the widest program.
MAX_ROWS = 64
# Programs that are kept, some 70 kB each for 30 layers: the last used of one for each number of rows, kinds
# of adapters, and whether rows are of one sequence.
_MAX_PROGRAMS = 128


class DecodePrograms:
    """The programs of one base, which is given to each call: the base holds them, and weights that nothing
    names any more are to leave the memory at once.

    Args:
        llama: the base, all its products in tiles.
    """

    def __init__(self, llama: "PackedLlama") -> None:
        self._buffers = llama.make_buffers(MAX_ROWS)
        self._logits_MV = llama.embedding_VD.new_empty(MAX_ROWS, llama.vocabulary_size)
        # By the number of rows. Between two steps the weights have gone through the processor's caches and
        # nothing else is left there: each call that makes a tensor then takes tens of microseconds.
        self._logits = [self._logits_MV[:num_rows] for num_rows in range(MAX_ROWS + 1)]
        self._best_M = torch.zeros(MAX_ROWS, dtype=torch.int64)
        num_pages = -(-llama.context_length // PAGE_SIZE)
        self._positions_M = torch.zeros(MAX_ROWS, dtype=torch.int64)
        self._pages_MW = torch.zeros(MAX_ROWS, num_pages, dtype=torch.int64)
        self._adapters_M = torch.zeros(MAX_ROWS, dtype=torch.int64)
        self._pages = self._pages_MW.numpy()
        numbers = (self._positions_M, self._adapters_M, self._best_M)
        self._positions, self._adapters, self._best = (memoryview(one.numpy()) for one in numbers)
        # As bytes, for numpy knows no bfloat16.
        self._vectors = llama.embedding_VD.view(torch.uint8).numpy()
        self._stream = self._buffers.stream_ND.view(torch.uint8).numpy()
        self._programs: OrderedDict[tuple[int, bool, bool, bool], Program] = OrderedDict()
        # The threads, and the address of the kernels' own memory.
        self._recorded_for = (0, 0)

    @staticmethod
    def can_run(chunks: Sequence[Chunk]) -> bool:
        """Whether a step is one of these: single rows, or few of one sequence, that all want their logits."""
        num_rows = 0
        for one in chunks:
            count = len(one.tokens)
            if one.num_logits != count or not (one.by_rows or count == 1):
                return False
            num_rows += count
        return 0 < num_rows <= MAX_ROWS

    def step(
        self,
        llama: "PackedLlama",
        chunks: Sequence[Chunk],
        on_launch: Callable[[], None] | None = None,
    ) -> Logits:
        """Run a step, as `PackedLlama.step` does; the logits are overwritten by the next one."""
        ids: list[int] = []
        adapters: list[AdapterDescriptor | None] = []
        for one in chunks:
            pages, adapter = one.pages, one.adapter
            for position, token in enumerate(one.tokens, one.first):
                row, width = len(ids), position // PAGE_SIZE + 1
                self._pages[row, :width] = pages[:width]
                self._positions[row] = position
                self._adapters[row] = 0 if adapter is None else adapter.address
                ids.append(token)
                adapters.append(adapter)
        num_rows = len(ids)
        if any(isinstance(one.tokens, torch.Tensor) for one in chunks):
            with torch.inference_mode():
                llama.embed(chunks, self._buffers.stream_ND[:num_rows])
        else:
            if min(ids) < 0 or max(ids) >= len(self._vectors):
                raise IndexError("A token is none of the base's.")
            # All are there: any other mode would copy them once more.
            np.take(self._vectors, ids, axis=0, out=self._stream[:num_rows], mode="clip")
        program = self._program(llama, adapters, are_alone=num_rows == len(chunks))
        if on_launch is not None:
            on_launch()
        program.run()
        return Logits(self._logits[num_rows], self._best[:num_rows].tolist())

    @staticmethod
    def can_write(llama: "PackedLlama", inputs: StepInputs) -> bool:
        """Whether all that a step's layers do with chunks is done by kernels."""
        adapters = [] if inputs.chunks is None else inputs.chunks.adapters
        are_known = all(
            one is None or (one.max_rank <= PREFILL_RANK and not one.has_bottlenecks) for one in adapters
        )
        return llama.ops.has_prefill_kernels and are_known

    @staticmethod
    def run_layers(
        llama: "PackedLlama",
        buffers: Buffers,
        inputs: StepInputs,
        on_launch: Callable[[], None] | None = None,
    ) -> None:
        """Run the layers, as `PackedLlama.run_layers` does, in one call; `on_launch` is called before it."""
        with recording(kernels.compiled_address("run_program", llama.dtype)) as program:
            llama.run_layers(buffers, inputs)
        if on_launch is not None:
            on_launch()
        program.run()

    def _program(
        self, llama: "PackedLlama", adapters: Sequence[AdapterDescriptor | None], *, are_alone: bool
    ) -> Program:
        recorded_for = torch.get_num_threads(), llama.ops.memory_at
        if recorded_for != self._recorded_for:
            self._programs.clear()
            self._recorded_for = recorded_for
        has_low_ranks = any(one is not None and one.has_low_ranks for one in adapters)
        has_bottlenecks = any(one is not None and one.has_bottlenecks for one in adapters)
        key = len(adapters), has_low_ranks, has_bottlenecks, are_alone
        program = self._programs.pop(key, None) or self._record(llama, adapters, are_alone=are_alone)
        self._programs[key] = program
        if len(self._programs) > _MAX_PROGRAMS:
            self._programs.popitem(last=False)
        return program

    @torch.inference_mode()
    def _record(
        self, llama: "PackedLlama", adapters: Sequence[AdapterDescriptor | None], *, are_alone: bool
    ) -> Program:
        num_rows = len(adapters)
        rows = SingleRows(adapters, self._adapters_M[:num_rows])
        buffers = self._buffers.first(num_rows)
        tokens = TokenRows(self._positions_M[:num_rows], self._pages_MW[:num_rows], num_rows, are_alone)
        runner = kernels.compiled_address("run_program", llama.dtype)
        with recording(runner) as program:
            inputs = StepInputs(rows, tokens)
            llama.run_layers(buffers, inputs)
            change_MD = llama.finish_layers(buffers, inputs)
            logits_MV = self._logits_MV[:num_rows]
            llama.run_head(buffers.stream_ND, change_MD, buffers.normed_ND, logits_MV)
            find_best(logits_MV, self._best_M[:num_rows])
        # Two norms, attention, a gate and four products a block, and what adapters add; a norm, the head and
        # the likeliest tokens.
        num_kernels = 8 + 4 * rows.has_low_ranks + 2 * rows.has_bottlenecks + (not are_alone)
        if len(program) != llama.num_layers * num_kernels + 3:
            raise RuntimeError(f"A step of {len(program)} kernels was recorded, not what a step has.")
        return program
