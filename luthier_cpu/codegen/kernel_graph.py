"""The compiled kernel that runs others one after another; threads meet where one reads what another wrote."""

# What an intrinsic takes is in its arguments, which only the generated code reads; numba reads the loops.
# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from llvmlite import ir
from numba import carray

from luthier_cpu.codegen.memory_access import emitted
from luthier_cpu.codegen.numba_kernel import Kernel, at_int64, open_table
from luthier_cpu.codegen.openmp import TABLE_SIZE

_I64 = ir.IntType(64)


@emitted()
def _run_kernel(builder, address, table):
    """Call a kernel with its table, both as addresses."""
    kernel = ir.FunctionType(ir.VoidType(), [_I64.as_pointer()])
    place = builder.inttoptr(table, _I64.as_pointer())
    builder.call(builder.inttoptr(address, kernel.as_pointer()), [place])


@emitted()
def _meet(builder, address):
    """Wait until all threads of the team are here, by a C function of no arguments."""
    kind = ir.FunctionType(ir.VoidType(), ())
    builder.call(builder.inttoptr(address, kind.as_pointer()), ())


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
