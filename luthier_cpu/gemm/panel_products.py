"""Products of a training step with a weight and its low-rank updates, in pairs of bfloat16 by panels.

They run at what the processor's products of pairs can do, of any number of rows alike, keep no copy of a
weight, and read the updates where they are trained. Where there is a matrix unit, oneDNN's are faster.

Legend: N rows, D inputs, O outputs, R a part's rank, U the parts' ranks side by side, each filled up to a
multiple of 16.
"""

import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from luthier_cpu.codegen import kernels
from luthier_cpu.codegen.openmp import launch

_LOG = logging.getLogger(__name__)
# Columns of a panel, the bytes of its line of pairs, and how many lines of one are packed at a time: as many
# as stay in a processor's second cache.
PANEL_COLUMNS, LINE_BYTES, MOST_PAIRS = 48, 192, 1024
# Zeros and the sums of a block, before a thread's panels.
HEAD_BYTES = 4096
# What a kernel reads of a part: where `a` and `b` are, rank, first output, outputs, first column of u,
# scale, and where the gradients of `a` and `b` go.
A, B, RANK, FIRST_OUTPUT, NUM_OUTPUTS, FIRST_COLUMN, SCALE, GRADIENT_A, GRADIENT_B = range(9)
NUM_FACTS = 9
# What sizes must be a multiple of: a line of memory of bfloat16.
_ALIGN = 32
_RANK_ALIGN = 16
# Rows that are multiplied together.
BLOCK_ROWS = 8
# Of the largest number; a rounding to bfloat16 is 2^-9 of a number.
_LARGEST_GAP = 2e-2
_PAGE = 4096


@dataclass(frozen=True)
class Part:
    """A layer of several that share an input: its outputs, and `scale * b a` beside it where there is one.

    `a_RD` and `b_OR` are float32 and contiguous.
    """

    num_outputs: int
    a_RD: torch.Tensor | None = None
    b_OR: torch.Tensor | None = None
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Its rank, 0 without an update."""
        return 0 if self.a_RD is None else len(self.a_RD)


class PanelProducts:
    """The products with one weight, whose rows are the outputs of parts one below the other.

    For one thread at a time.

    Args:
        weight_OD: bfloat16; read at every product, never copied.

    Raises:
        ValueError: for what `can_multiply` says no to.
    """

    def __init__(self, weight_OD: torch.Tensor, parts: Sequence[Part]) -> None:
        if not _may_multiply() or not _fits(weight_OD, parts):
            raise ValueError("These products can't be made by panels here.")
        self._weight_OD, self._parts = weight_OD, parts
        self._facts = np.zeros((len(parts), NUM_FACTS), dtype=np.int64)
        self._facts_at = self._facts.ctypes.data
        output, column, low_bytes = 0, 0, 0
        for part, facts in zip(parts, self._facts, strict=True):
            filled = -(-part.rank // _RANK_ALIGN) * _RANK_ALIGN
            own = part.rank, output, part.num_outputs, column, kernels.float_bits(part.scale)
            facts[RANK : SCALE + 1] = own
            output, column = output + part.num_outputs, column + filled
            low_bytes += -(-filled // _ALIGN) * _ALIGN // 2 * LINE_BYTES
        self._num_u, self._low_bytes = column, low_bytes
        # Where the updates were when they were last looked at.
        self._places: list[tuple[int, int]] = [(0, 0)] * len(parts)
        self._look_up()

    def low_rank(self, x_ND: torch.Tensor) -> torch.Tensor | None:
        """Return u_NU, the products with every part's `a`; None without updates."""
        return self._low_rank(x_ND, is_backward=False)

    def low_rank_gradient(self, gradient_NO: torch.Tensor) -> torch.Tensor | None:
        """Return the gradient of u; None without updates."""
        return self._low_rank(gradient_NO, is_backward=True)

    def product(
        self,
        x_ND: torch.Tensor,
        u_NU: torch.Tensor | None = None,
        residual_NO: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return `x W'` with the updates of `low_rank`, plus a residual."""
        out_NO = x_ND.new_empty(x_ND.shape[0], self._weight_OD.shape[0])
        return self._product(x_ND, u_NU, residual_NO, out_NO, is_backward=False)

    def input_gradient(
        self, gradient_NO: torch.Tensor, gradient_NU: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the gradient of x."""
        out_ND = gradient_NO.new_empty(gradient_NO.shape[0], self._weight_OD.shape[1])
        return self._product(gradient_NO, gradient_NU, None, out_ND, is_backward=True)

    def input_gradients(self, gradient_NO: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the gradients of x and of u."""
        gradient_NU = self.low_rank_gradient(gradient_NO)
        return self.input_gradient(gradient_NO, gradient_NU), gradient_NU

    def update_gradients(
        self,
        gradient_NO: torch.Tensor,
        x_ND: torch.Tensor,
        u_NU: torch.Tensor,
        gradient_NU: torch.Tensor,
    ) -> list[torch.Tensor]:
        """Return the gradients of `a` and `b` of every part that has them, float32."""
        num_outputs, num_inputs = self._weight_OD.shape
        self._check(gradient_NO, num_outputs)
        self._check(x_ND, num_inputs, like=gradient_NO)
        for one in (u_NU, gradient_NU):
            self._check(one, self._num_u, like=gradient_NO)
        gradients: list[torch.Tensor] = []
        self._look_up()
        for part, facts in zip(self._parts, self._facts, strict=True):
            if part.rank:
                sizes = (part.rank, num_inputs), (part.num_outputs, part.rank)
                made = [torch.empty(size, dtype=torch.float32) for size in sizes]
                facts[GRADIENT_A : GRADIENT_B + 1] = [one.data_ptr() for one in made]
                gradients += made
        num_rows = x_ND.shape[0]
        pairs = (num_rows + 1) // 2 * (self._num_u * 4 + LINE_BYTES)
        operands = [x_ND.data_ptr(), num_inputs * 2, gradient_NO.data_ptr(), num_outputs * 2]
        rows = [0, u_NU.data_ptr(), gradient_NU.data_ptr(), self._num_u, 0, 0, 0]
        sizes_of = [num_rows, num_inputs, 0]
        self._run("panel_update_gradients", [*sizes_of, *operands, *rows], HEAD_BYTES + pairs)
        return gradients

    def _low_rank(self, x: torch.Tensor, *, is_backward: bool) -> torch.Tensor | None:
        if self._num_u == 0:
            return None
        num_outputs, num_inputs = self._weight_OD.shape
        num_columns = num_outputs if is_backward else num_inputs
        self._check(x, num_columns)
        self._look_up()
        num_rows = x.shape[0]
        u_NU = x.new_empty(num_rows, self._num_u)
        operands = [x.data_ptr(), num_columns * 2, 0, 0, int(is_backward), u_NU.data_ptr(), self._num_u * 2]
        scratch = HEAD_BYTES + max(num_columns, _ALIGN) // 2 * _RANK_ALIGN * 4
        self._run("panel_low_rank", [num_rows, num_inputs, 0, *operands, 0, 0, 0, 0], scratch)
        return u_NU

    def _product(
        self,
        x: torch.Tensor,
        u_NU: torch.Tensor | None,
        residual: torch.Tensor | None,
        out: torch.Tensor,
        *,
        is_backward: bool,
    ) -> torch.Tensor:
        num_rows, num_summed = x.shape[0], self._weight_OD.shape[0 if is_backward else 1]
        self._check(x, num_summed)
        u_at, u_stride, added_at = 0, 0, 0
        if self._num_u:
            if u_NU is None:
                raise ValueError("A product with updates takes what their first half gave.")
            self._check(u_NU, self._num_u, like=x)
            u_at, u_stride = u_NU.data_ptr(), self._num_u * 2
        if residual is not None:
            self._check(residual, out.shape[1], like=x)
            added_at = residual.data_ptr()
        self._look_up()
        stride = out.shape[1] * 2
        num_chunks = self._num_chunks(num_rows, out.shape[1])
        numbers = [
            *(num_rows, num_summed, out.shape[1]),
            *(x.data_ptr(), num_summed * 2, self._weight_OD.data_ptr(), self._weight_OD.stride(0) * 2),
            *(int(is_backward), out.data_ptr(), stride, added_at, stride, u_at, u_stride),
        ]
        # Whole blocks but for the last chunk; and how many panels a thread does, each with a chunk's rows.
        chunk_rows = -(-num_rows // (num_chunks * BLOCK_ROWS)) * BLOCK_ROWS
        sizes = [out.shape[1]] if is_backward else [part.num_outputs for part in self._parts]
        num_panels = sum(-(-size // PANEL_COLUMNS) for size in sizes)
        num_tasks = -(-num_panels * num_chunks // torch.get_num_threads())
        lines = self._low_bytes + min(MOST_PAIRS, num_summed // 2) * LINE_BYTES
        if num_summed // 2 > MOST_PAIRS:
            # Room for sums that continue.
            lines += num_tasks * chunk_rows * LINE_BYTES
        more = (num_chunks, self._low_bytes, num_tasks, chunk_rows)
        self._run("panel_product", numbers, HEAD_BYTES + lines, *more)
        return out

    def _num_chunks(self, num_rows: int, num_columns: int) -> int:
        """Return in how many parts rows go by a panel: one, unless threads would find no panel."""
        wanted = -(-2 * torch.get_num_threads() * PANEL_COLUMNS // num_columns)
        return max(1, min(wanted, num_rows // PANEL_COLUMNS))

    def _run(self, name: str, numbers: list[int], scratch_bytes: int, *more: int) -> None:
        scratch_bytes = -(-scratch_bytes // _PAGE) * _PAGE
        room = scratch(scratch_bytes * torch.get_num_threads())
        facts = (self._facts_at, len(self._parts))
        launch(kernels.compiled_address(name, torch.bfloat16), [*numbers, *facts, room, scratch_bytes, *more])

    def _look_up(self) -> None:
        """Note where the updates are now, and see that others in their place can be read."""
        for number, part in enumerate(self._parts):
            if part.a_RD is None or part.b_OR is None:
                continue
            places = part.a_RD.data_ptr(), part.b_OR.data_ptr()
            if self._places[number] != places:
                if not _can_read(part, self._weight_OD.shape[1]):
                    raise ValueError(
                        "Products by panels read updates that are contiguous float32 on the CPU."
                    )
                self._facts[number, A : B + 1] = self._places[number] = places

    def _check(self, rows: torch.Tensor, width: int, like: torch.Tensor | None = None) -> None:
        num_rows = (rows if like is None else like).shape[0]
        has_shape = rows.shape == (num_rows, width) and rows.is_contiguous()
        if not (has_shape and rows.dtype == torch.bfloat16 and rows.device.type == "cpu"):
            raise ValueError(f"Products by panels take contiguous bfloat16 rows of {width} on the CPU.")


_ROOM = threading.local()


def scratch(num_bytes: int) -> int:
    """Return the address of memory that the next kernel of this thread works in."""
    held: torch.Tensor | None = getattr(_ROOM, "held", None)
    if held is None or len(held) < num_bytes + _PAGE:
        _ROOM.held = held = torch.empty(num_bytes + _PAGE, dtype=torch.uint8)
    return -(-held.data_ptr() // _PAGE) * _PAGE


def can_multiply(weight_OD: torch.Tensor, parts: Sequence[Part]) -> bool:
    """Whether products with a weight and its updates are made by panels here."""
    return _fits(weight_OD, parts) and has_panels()


def _fits(weight_OD: torch.Tensor, parts: Sequence[Part]) -> bool:
    sizes = [part.num_outputs for part in parts]
    return (
        weight_OD.dtype == torch.bfloat16
        and weight_OD.stride(1) == 1
        and kernels.is_compiled(weight_OD)
        and sum(sizes) == len(weight_OD)
        and all(size > 0 and size % _ALIGN == 0 for size in (*sizes, weight_OD.shape[1]))
        and all(_can_read(part, weight_OD.shape[1]) for part in parts)
    )


def _can_read(part: Part, num_inputs: int) -> bool:
    """Whether a part has no update, or one of its size that kernels can read."""
    if part.a_RD is None or part.b_OR is None:
        return part.a_RD is part.b_OR
    has_shape = (part.a_RD.shape, part.b_OR.shape) == (
        (part.rank, num_inputs),
        (part.num_outputs, part.rank),
    )
    return has_shape and all(
        one.dtype == torch.float32 and one.is_contiguous() and kernels.is_compiled(one)
        for one in (part.a_RD, part.b_OR)
    )


@cache
def _may_multiply() -> bool:
    """Whether the kernels' processor has products of pairs, and no matrix unit."""
    from luthier_cpu.codegen.memory_access import HAS_PAIRS, HAS_UNIT

    return HAS_PAIRS and not HAS_UNIT


@cache
def has_panels() -> bool:
    """Whether products by panels run here: the processor is one for them, and some come out right."""
    return _may_multiply() and come_out_right("Products by panels", map(_largest_gap, (1, 9, 35)))


def come_out_right(what: str, gaps: Iterable[float], *, largest: float = _LARGEST_GAP) -> bool:
    """Whether results tried out are near enough to float32's; says so in the log where they are not.

    Args:
        gaps: by how much each is off, as a share of the largest number.
    """
    for gap in gaps:
        # Not a gap that is no number either.
        if not gap <= largest:
            _LOG.warning("%s are off by %.2g; other products run, slower.", what, gap)
            return False
    return True


def _largest_gap(num_rows: int) -> float:
    """Return by how much products of random numbers are off, as a share of the largest number."""
    generator = torch.Generator().manual_seed(0)
    num_inputs, sizes, ranks = 96, (64, 32), (16, 5)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    parts = [
        Part(size, random(rank, num_inputs), random(size, rank), 0.5)
        for size, rank in zip(sizes, ranks, strict=True)
    ]
    weight_OD = random(sum(sizes), num_inputs).bfloat16()
    x_ND, y_NO = random(num_rows, num_inputs).bfloat16(), random(num_rows, sum(sizes)).bfloat16()
    made = PanelProducts(weight_OD, parts)
    u_NU, gradient_NU = made.low_rank(x_ND), made.low_rank_gradient(y_NO)
    assert u_NU is not None
    assert gradient_NU is not None
    found = [made.product(x_ND, u_NU, y_NO), made.input_gradient(y_NO, gradient_NU)]
    found += made.update_gradients(y_NO, x_ND, u_NU, gradient_NU)
    # Gradients by hand: autograd's first backward pass starts threads, and this runs in a process that forks.
    x, y = x_ND.float(), y_NO.float()
    updates, gradients = [], []
    for part, own in zip(parts, y.split(sizes, dim=1), strict=True):
        assert part.a_RD is not None
        assert part.b_OR is not None
        updates.append(part.scale * part.b_OR @ part.a_RD)
        gradients += [part.scale * (own @ part.b_OR).t() @ x, part.scale * own.t() @ (x @ part.a_RD.t())]
    whole = weight_OD.float() + torch.cat(updates)
    return largest_difference(found, [x @ whole.t() + y, y @ whole, *gradients])


def largest_difference(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    """Return by how much results are off, as a share of the largest number."""
    gaps = [(a.float() - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)]
    return float(torch.stack(gaps).max())
