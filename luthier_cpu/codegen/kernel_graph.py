"""The compiled kernel that runs others one after another; threads meet where one reads what another wrote."""

# What an intrinsic takes is in its arguments, which only the generated code reads; numba reads the loops.
# ruff: noqa: ARG001
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from luthier_cpu.codegen.numba_kernel import Kernel, at_int64, open_table
from luthier_cpu.codegen.openmp import TABLE_SIZE

_I64 = ir.IntType(64)


@intrinsic
def _run_kernel(_context: Any, address: Any, table: Any) -> Any:
    """Call a kernel with its table, both as addresses."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        kernel = ir.FunctionType(ir.VoidType(), [_I64.as_pointer()])
        address, table = arguments
        place = builder.inttoptr(table, _I64.as_pointer())
        builder.call(builder.inttoptr(address, kernel.as_pointer()), [place])
        return _I64(0)

    return types.int64(types.int64, types.int64), generate


@intrinsic
def _meet(_context: Any, address: Any) -> Any:
    """Wait until all threads of the team are here, by a C function of no arguments."""

    def generate(_target: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), ())
        builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), ())
        return _I64(0)

    return types.int64(types.int64), generate


@Kernel
def run_program(data):
    """Run the kernels whose addresses are named, each with the table of the same number.

    Threads meet after those that say so.
    """
    table = open_table(data)
    num_kernels, barrier = table[2], table[3]
    addresses, tables_at = carray(at_int64(table[4]), num_kernels), table[5]
    meets = carray(at_int64(table[6]), num_kernels)
    for number in range(num_kernels):
        _run_kernel(addresses[number], tables_at + number * TABLE_SIZE * 8)
        if barrier != 0 and meets[number] != 0:
            _meet(barrier)
