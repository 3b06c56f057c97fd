"""bfloat16 weights in three quarters of their memory, every bit of them kept.

A step of few rows takes as long as memory gives the weights. The upper byte of a bfloat16 number, its sign
and seven bits of its exponent, takes few values: nearly all numbers of a panel of 64 outputs have one of the
panel's 15 most frequent. So four bits say which (codes 1 to 15), and the lower byte lies as it is. Code 0 is
that of an upper byte of zero. The few numbers with another upper byte are zero there and lie in a list of
their own, the panel's exceptions, whose products are added (dictionary compression with exceptions: Zukowski
et al. 2006, "Super-Scalar RAM-CPU Cache Compression"). The kernels make lines of bfloat16 again in registers,
beside products, for which a processor has other parts.

A panel begins with a header of 64 bytes: the upper byte of each code, 16 bytes; then int64 numbers: the
address of its exceptions, how many are in its first 32 outputs, and how many in the others. Behind it lie its
tiles (_tiles.py), of a tile four times three lines of 64 bytes: the codes of four lines of weights, in the
lower half of each byte those of the first two; the lower bytes of the first two; and of the last two. Of two
lines the bytes lie in the order in which a processor interleaves them: of each quarter of 16 bytes the first
eight are the first line's.

An exception is an int64: its input from bit 32 on, its output in the panel from bit 16 on, its bits. Where an
input of a product is infinite, the zero in an exception's place makes the result NaN in place of infinite: it
is no number either way.

Legend: O outputs, K inputs, B bytes, E exceptions, P panels, H numbers of a header, T halves, Y values of a
byte.
"""

import torch

from luthier.modeling import kernels
from luthier.modeling.kernels._threads import launch
from luthier.modeling.kernels.shapes import PANEL_OUTPUTS, TILE_INPUTS

HEADER_BYTES = 64
# Of a tile of 16 outputs and 32 inputs, and of a panel and 32 inputs.
DENSE_TILE_BYTES = 768
DENSE_STEP_BYTES = 4 * DENSE_TILE_BYTES
# Values of a byte.
NUM_BYTES = 256
# The header's int64 numbers: where a panel's exceptions begin, and how many each half has, first and second.
EXCEPTIONS, COUNT = 2, 3
# A weight may have one exception in so many numbers, and a panel one: more of them take longer, in a step of
# many rows, than memory takes for what is saved.
_LEAST_OF_WEIGHT, _LEAST_OF_PANEL = 64, 16


class UnevenWeightError(ValueError):
    """A weight has too many numbers whose upper bytes are not among the frequent ones."""


def dense_bytes(num_outputs: int, num_inputs: int) -> int:
    """Return the memory of a weight that lies so, without its exceptions.

    Args:
        num_inputs: K, a multiple of 32.
    """
    panel_bytes = HEADER_BYTES + num_inputs // TILE_INPUTS * DENSE_STEP_BYTES
    return -(-num_outputs // PANEL_OUTPUTS) * panel_bytes


def lay_dense(weight_OK: torch.Tensor, memory_B: torch.Tensor) -> torch.Tensor:
    """Lay a weight out.

    Args:
        weight_OK: bfloat16 on a CPU, K a multiple of 32.
        memory_B: uint8 on a CPU, `dense_bytes` of it, from a multiple of 64 bytes on.

    Returns:
        exceptions_E, int64, to which the memory points: it is to be kept as long.

    Raises:
        ValueError: when weight or memory is not like that.
        UnevenWeightError: when there are too many exceptions; nothing was written then.
    """
    num_outputs, num_inputs = weight_OK.shape
    is_weight = weight_OK.dtype == torch.bfloat16 and num_inputs % TILE_INPUTS == 0
    is_room = memory_B.dtype == torch.uint8 and memory_B.dim() == 1 and memory_B.is_contiguous()
    is_there = weight_OK.device.type == memory_B.device.type == "cpu"
    if not (is_weight and is_room and is_there and memory_B.data_ptr() % HEADER_BYTES == 0):
        raise ValueError("A weight is laid dense from bfloat16 into bytes on a CPU, at a whole line.")
    if len(memory_B) != dense_bytes(num_outputs, num_inputs):
        raise ValueError("A weight is laid dense into memory of its size.")
    weight_OK = weight_OK.contiguous()
    num_panels = -(-num_outputs // PANEL_OUTPUTS)
    headers_PH = torch.zeros(num_panels, HEADER_BYTES // 8, dtype=torch.int64)
    # Of each panel how often each of its halves has each byte, then the codes of bytes.
    room_PTY = torch.zeros(num_panels, 2, NUM_BYTES, dtype=torch.int64)
    tensors = (weight_OK, headers_PH, room_PTY)
    sizes = (num_outputs, num_inputs)
    launch(
        kernels.compiled_address("find_upper_bytes", torch.bfloat16),
        [*sizes, *(one.data_ptr() for one in tensors)],
    )
    counts_P = headers_PH[:, COUNT : COUNT + 2].sum(1)
    num_exceptions = int(counts_P.sum())
    most_of_panel = PANEL_OUTPUTS * num_inputs // _LEAST_OF_PANEL
    if num_exceptions * _LEAST_OF_WEIGHT > weight_OK.numel() or int(counts_P.max()) > most_of_panel:
        told = f"{num_exceptions} of {weight_OK.numel()} numbers"
        raise UnevenWeightError(f"{told} have upper bytes of their own.")
    exceptions_E = torch.empty(num_exceptions, dtype=torch.int64)
    before_P = counts_P.cumsum(0) - counts_P
    headers_PH[:, EXCEPTIONS] = exceptions_E.data_ptr() + before_P * exceptions_E.element_size()
    memory_B.view(torch.int64).view(num_panels, -1)[:, : HEADER_BYTES // 8] = headers_PH
    launch(
        kernels.compiled_address("lay_panels", torch.bfloat16),
        [*sizes, weight_OK.data_ptr(), memory_B.data_ptr(), room_PTY.data_ptr()],
    )
    return exceptions_E
