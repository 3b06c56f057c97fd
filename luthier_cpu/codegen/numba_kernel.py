"""What compiled kernels are made of: float32 arithmetic over float32 or bfloat16 memory, row by row.

A kernel does in one pass over memory what takes the plain operators many. numba compiles it when it is
first called and keeps the machine code on disk. numpy has no bfloat16, so its bits travel as uint16. No
flag that assumes finite numbers is set: what is no number must stay visible.

A kernel is a C function of one pointer, so that torch's own pool of threads can run it (openmp.py): to a
table of int64 numbers, typed as what the tensors hold. The table begins with the addresses of
`omp_get_thread_num` and `omp_get_num_threads`, 0 where one thread does all; the arguments follow, tensors
as addresses. Each thread takes its share of the rows.
"""

# numba reads the loops themselves and takes their types from the arguments.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"
# ruff: noqa: ARG001, ARG005, PLW0108

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import carray, cfunc, njit, types
from numba.extending import intrinsic, overload

from luthier_cpu.codegen.memory_access import emitted, to_bfloat16
from luthier_cpu.codegen.openmp import TABLE_SIZE

# Between which numbers the exponential is taken; and ln 2 in two parts, so that a whole number times the
# first is exact.
EXP_LOWEST, EXP_HIGHEST = -87.0, 88.0
LOG2_E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.693145751953125, 1.428606765330187e-06
# The bits of 1.0.
ONE = 0x3F800000

_FAST = {"contract", "reassoc", "arcp", "nsz", "afn"}
inlined = njit(inline="always", fastmath=_FAST, error_model="numpy")


# numba widens integer arithmetic to 64 bits, which halves what a vector holds: the bit work is written in 32.
_I64, _I32, _F32 = ir.IntType(64), ir.IntType(32), ir.FloatType()


def _keep_code() -> None:
    """Let numba keep machine code in a folder named after the package's source.

    By itself it compares a kernel's own file only: code that was compiled with an older version of what that
    file imports would still be used.
    """
    package = Path(__file__).parents[1]
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(package.rglob("*.py"))))
    root = numba.config.CACHE_DIR or os.environ.get("XDG_CACHE_HOME")
    if not root:
        try:
            root = str(Path.home() / ".cache")
        except RuntimeError:
            # A user without a home: numba looks for a place itself, beside the source.
            return
    if root != numba.config.CACHE_DIR:
        root = str(Path(root) / "luthier" / "kernels")
    numba.config.CACHE_DIR = str(Path(root) / digest.hexdigest()[:16])


def _compile(body: Callable[..., None], signature: Any) -> Any:
    options = {"fastmath": _FAST, "error_model": "numpy"}
    try:
        return cfunc(signature, cache=True, **options)(body)
    except (RuntimeError, OSError):
        # Nowhere to keep it: every process compiles for itself.
        return cfunc(signature, **options)(body)


_keep_code()


KERNELS: "dict[str, Kernel]" = {}


class Kernel:
    """One kernel, compiled for each type when it is first wanted; decorates its body."""

    def __init__(self, body: Callable[..., None]) -> None:
        KERNELS[body.__name__] = self
        self._body = body
        self._addresses: dict[bool, int] = {}
        self._kept: list[Any] = []

    def address(self, *, is_bfloat16: bool) -> int:
        """Return the machine code's address."""
        if is_bfloat16 not in self._addresses:
            held = types.uint16 if is_bfloat16 else types.float32
            compiled = _compile(self._body, types.void(types.CPointer(held)))
            # The code lives as long as the object.
            self._kept.append(compiled)
            self._addresses[is_bfloat16] = compiled.address
        return self._addresses[is_bfloat16]


@intrinsic
def _table_of(_context: Any, data: Any) -> Any:
    """Read the kernel's pointer as one to int64."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], _I64.as_pointer())

    return types.CPointer(types.int64)(data), generate


@intrinsic
def at(_context: Any, address: Any, data: Any) -> Any:
    """Return an address as a pointer to what the tensors hold."""

    def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], target.get_value_type(signature.return_type))

    return data(types.int64, data), generate


def _pointer_to(held: Any) -> Any:
    @intrinsic
    def pointer(_context: Any, address: Any) -> Any:
        def generate(target: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], target.get_value_type(signature.return_type))

        return types.CPointer(held)(types.int64), generate

    return pointer


at_float32, at_float64, at_int64, at_uint8 = (
    _pointer_to(held) for held in (types.float32, types.float64, types.int64, types.uint8)
)


@emitted(types.float32)
def number(builder, bits):
    """Read the lower half of an int64 as a float32."""
    return builder.bitcast(builder.trunc(bits, _I32), _F32)


@emitted()
def _call(builder, address):
    """Call a C function of no arguments that returns an int, at its address."""
    kind = ir.FunctionType(_I32, ())
    return builder.sext(builder.call(builder.inttoptr(address, kind.as_pointer()), ()), _I64)


@inlined
def open_table(data):
    """Return the table behind a kernel's pointer."""
    return carray(_table_of(data), TABLE_SIZE)


@inlined
def share(table, num_rows):
    """Return the first row of this thread and the one after its last."""
    if table[0] == 0:
        return 0, num_rows
    # The team may be smaller than was asked for.
    thread, num_threads = _call(table[0]), _call(table[1])
    return num_rows * thread // num_threads, num_rows * (thread + 1) // num_threads


@inlined
def thread_number(table):
    """Return this thread's number in the team."""
    return 0 if table[0] == 0 else _call(table[0])


@inlined
def open_scratch(table, place, num_zero_bytes):
    """Return this thread's own memory, which begins with a line of zeros.

    At a place of the table stand the address of all threads' memory and the bytes of one's.
    """
    scratch_at = table[place] + thread_number(table) * table[place + 1]
    zeros = carray(at_int64(scratch_at), num_zero_bytes // 8)
    for i in range(num_zero_bytes // 8):
        zeros[i] = 0
    return scratch_at


@emitted(types.float32, bits=types.uint16)
def _from_bfloat16(builder, bits):
    """Read the bits of a bfloat16 as a float32: they are its upper half."""
    return builder.bitcast(builder.shl(builder.zext(bits, _I32), _I32(16)), _F32)


@emitted(types.uint16, value=types.float32)
def _to_bfloat16(builder, value):
    """Return the bits of the nearest bfloat16, of two equally near ones the even."""
    return to_bfloat16(builder, value)


@emitted(types.float32, exponent=types.float32)
def _power_of_two(builder, exponent):
    """Return 2 to a whole float32 from -126 to 127, by its bits."""
    biased = builder.add(builder.fptosi(exponent, _I32), _I32(127))
    return builder.bitcast(builder.shl(biased, _I32(23)), _F32)


def wide(stored):
    """Return what is stored as a float32."""


@overload(wide, inline="always")
def _wide_overload(stored):
    if stored == types.uint16:
        return lambda stored: _from_bfloat16(stored)
    return lambda stored: stored


def narrow(value, like):
    """Return a float32 as an array stores it."""


@overload(narrow, inline="always")
def _narrow_overload(value, like):
    if like.dtype == types.uint16:
        return lambda value, like: _to_bfloat16(np.float32(value))
    return lambda value, like: np.float32(value)


@inlined
def exponential(x):
    """e to the x in float32, within 2 units in the last place: 2^n times a polynomial on |r| <= ln(2)/2.

    The coefficients are those of the Taylor series to the 7th power. Below -87 the result is that of -87.
    """
    x = np.float32(EXP_LOWEST) if x < np.float32(EXP_LOWEST) else x
    x = np.float32(EXP_HIGHEST) if x > np.float32(EXP_HIGHEST) else x
    n = np.floor(x * np.float32(LOG2_E) + np.float32(0.5))
    r = x - n * np.float32(LN2_HIGH) - n * np.float32(LN2_LOW)
    p = np.float32(1.0 / 5040)
    p = p * r + np.float32(1.0 / 720)
    p = p * r + np.float32(1.0 / 120)
    p = p * r + np.float32(1.0 / 24)
    p = p * r + np.float32(1.0 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    return p * _power_of_two(n)
