"""How long the rows of an Arrow batch are, told without making one of their texts."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import types


def is_readable(kind: pa.DataType) -> bool:
    """Say whether the values of a type, its texts read as numbers, can be measured."""
    if isinstance(kind, pa.BaseExtensionType):
        return is_readable(kind.storage_type)
    if types.is_struct(kind):
        return all(is_readable(kind.field(index).type) for index in range(kind.num_fields))
    if types.is_map(kind):
        return is_readable(kind.key_type) and is_readable(kind.item_type)
    if types.is_list(kind) or types.is_large_list(kind):
        return is_readable(kind.value_type)
    return bool(types.is_dictionary(kind) or types.is_primitive(kind) or types.is_null(kind))


def _is_text(kind: pa.DataType) -> bool:
    return not (types.is_primitive(kind) or types.is_null(kind))


def count_values(array: pa.Array) -> int:
    """Return the number of values that are no lists in an array, of structs those of all members."""
    if isinstance(array, pa.ExtensionArray):
        return count_values(array.storage)
    if isinstance(array, pa.StructArray):
        return len(array) + sum(count_values(array.field(index)) for index in range(array.type.num_fields))
    if isinstance(array, pa.ListArray | pa.LargeListArray):
        return len(array) + count_values(array.values)
    return len(array)


def measure_rows(array: pa.Array) -> npt.NDArray[np.int64]:
    """Measure each value of an array.

    Returns:
        Two rows of numbers, (2, values): bytes of the texts in each value, and the values in it.
    """
    if isinstance(array, pa.ExtensionArray):
        return measure_rows(array.storage)
    found = np.ones((2, len(array)), np.int64)
    found[0] = 0
    if isinstance(array, pa.StructArray):
        for index in range(array.type.num_fields):
            found += measure_rows(array.field(index))
    elif isinstance(array, pa.ListArray | pa.LargeListArray):
        inner = measure_rows(array.values)
        sums = np.concatenate([np.zeros((2, 1), np.int64), inner.cumsum(axis=1)], axis=1)
        offsets = array.offsets.to_numpy()
        found += sums[:, offsets[1:]] - sums[:, offsets[:-1]]
    elif isinstance(array, pa.DictionaryArray):
        if _is_text(array.type.value_type):
            found[0] = _text_lengths(array)
    elif _is_text(array.type):
        if types.is_string_view(array.type) or types.is_binary_view(array.type):
            array = array.cast(pa.large_binary())
        found[0] = pc.fill_null(pc.binary_length(array), 0).to_numpy(zero_copy_only=False)
    return found


def _text_lengths(array: pa.DictionaryArray) -> npt.NDArray[np.int64]:
    lengths = pc.take(pc.binary_length(array.dictionary), array.indices)
    return np.asarray(pc.fill_null(lengths, 0).to_numpy(zero_copy_only=False))
