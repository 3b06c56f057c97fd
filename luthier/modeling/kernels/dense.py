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

An exception is an int64: its input from bit 32 on, its output in the panel from bit 16 on, its bits.
"""

import torch

from luthier.modeling import kernels
from luthier.modeling.kernels._threads import launch

HEADER_BYTES = 64
# Of a tile of 16 outputs and 32 inputs, and of a panel and 32 inputs.
DENSE_TILE_BYTES = 768
DENSE_STEP_BYTES = 4 * DENSE_TILE_BYTES
_PANEL_OUTPUTS, _TILE_INPUTS = 64, 32
_NUM_BYTES = 256
# Where a panel's exceptions begin, and how many there are in each half, among its header's int64 numbers.
EXCEPTIONS, COUNT = 2, 3
# Of so many numbers one may be an exception: more cost more time than memory takes for what is saved.
_NUMBERS_OF_EXCEPTION = 256


class UnevenWeightError(ValueError):
    """A weight has too many numbers whose upper bytes are not among the frequent ones."""


def dense_bytes(num_outputs: int, num_inputs: int) -> int:
    """Return the memory of a weight that lies so, without its exceptions."""
    panel_bytes = HEADER_BYTES + num_inputs // _TILE_INPUTS * DENSE_STEP_BYTES
    return -(-num_outputs // _PANEL_OUTPUTS) * panel_bytes


def lay_dense(weight_OK: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    """Lay a weight out.

    Args:
        weight_OK: bfloat16 on a CPU, K a multiple of 32.
        memory: uint8, as much as `dense_bytes` says, from a multiple of 64 bytes on.

    Returns:
        Its exceptions, to which the memory points: it is to be kept as long.

    Raises:
        ValueError: when weight or memory is not like that.
        UnevenWeightError: when there are too many exceptions; the memory may be used for something else.
    """
    num_outputs, num_inputs = weight_OK.shape
    num_bytes = dense_bytes(num_outputs, num_inputs)
    is_weight = weight_OK.dtype == torch.bfloat16 and num_inputs % _TILE_INPUTS == 0
    is_room = memory.dtype == torch.uint8 and memory.is_contiguous() and len(memory) == num_bytes
    if not (is_weight and is_room and memory.data_ptr() % HEADER_BYTES == 0):
        raise ValueError("A weight is laid dense from bfloat16 into memory of its size, at a whole line.")
    weight_OK = weight_OK.contiguous()
    num_panels = -(-num_outputs // _PANEL_OUTPUTS)
    room = torch.zeros(num_panels, 2, _NUM_BYTES, dtype=torch.int64)
    arguments = [num_outputs, num_inputs, weight_OK.data_ptr(), memory.data_ptr(), room.data_ptr()]
    launch(kernels.compiled_address("find_upper_bytes", torch.bfloat16), arguments)
    headers = memory.view(torch.int64).view(num_panels, -1)
    counts_P = headers[:, COUNT : COUNT + 2].sum(1)
    num_exceptions = int(counts_P.sum())
    if num_exceptions * _NUMBERS_OF_EXCEPTION > weight_OK.numel():
        raise UnevenWeightError(
            f"{num_exceptions} of {weight_OK.numel()} numbers have upper bytes of their own."
        )
    exceptions = torch.empty(num_exceptions, dtype=torch.int64)
    before_P = counts_P.cumsum(0) - counts_P
    headers[:, EXCEPTIONS] = exceptions.data_ptr() + before_P * exceptions.element_size()
    launch(kernels.compiled_address("lay_dense", torch.bfloat16), arguments)
    return exceptions
