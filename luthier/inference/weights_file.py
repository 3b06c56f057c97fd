"""The tensors of a safetensors file that lies in memory, where they are laid out from without a copy."""

import ctypes
import json
import math
from typing import Any

import torch

from luthier.core.errors import ArtifactCorruptError
from luthier.inference.mapped_file import address_of

# The format's own name of what may be there besides tensors, and of its types (safetensors, "Format").
_METADATA = "__metadata__"
_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LENGTH_BYTES = 8


def tensors_of(content: memoryview) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file, in the memory that the file lies in.

    Args:
        content: the file's bytes.

    Raises:
        ArtifactCorruptError: when it is no such file, or has tensors of another type than weights have.
    """
    try:
        length = int.from_bytes(content[:_LENGTH_BYTES], "little")
        begin = _LENGTH_BYTES + length
        if not 0 < length <= len(content) - _LENGTH_BYTES:
            raise ValueError("the header is longer than the file")
        header = json.loads(bytes(content[_LENGTH_BYTES:begin]))
        header.pop(_METADATA, None)
        numbers = _bytes_of(content)[begin:]
        whole = {
            dtype: numbers[: len(numbers) // dtype.itemsize * dtype.itemsize].view(dtype)
            for dtype in _TYPES.values()
            if begin % dtype.itemsize == 0
        }
        return {name: _tensor(numbers, whole, entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactCorruptError("The artifact's weights are no safetensors file.") from error


def _bytes_of(content: memoryview) -> torch.Tensor:
    """Return bytes as a tensor, which nobody may write: torch knows no such tensors, and would warn."""
    view = (ctypes.c_uint8 * len(content)).from_address(address_of(content))
    # The memory lives as long as the tensor.
    view.held = content  # type: ignore[attr-defined]
    return torch.frombuffer(view, dtype=torch.uint8)


def _tensor(
    numbers: torch.Tensor, whole: dict[torch.dtype, torch.Tensor], entry: dict[str, Any]
) -> torch.Tensor:
    """Return a tensor of a file's numbers; `whole` are all of them, of each type that they can be read as."""
    dtype, shape, (begin, end) = _TYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
    size = dtype.itemsize
    if not 0 <= begin <= end <= numbers.shape[0] or min(shape, default=1) < 0:
        raise ValueError("a tensor lies outside of the file")
    if math.prod(shape) * size != end - begin:
        raise ValueError("a tensor has another size than its shape")
    if dtype in whole and begin % size == 0:
        return whole[dtype][begin // size : end // size].view(shape)
    return numbers[begin:end].clone().view(dtype).view(shape)
