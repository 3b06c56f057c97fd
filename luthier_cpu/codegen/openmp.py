"""Running a compiled kernel on torch's own threads.

torch's operators share one pool of OpenMP threads. A second pool beside it would wait for cores on which
the first one still spins, and would have to be woken for every call; so kernels run on the first. libgomp's
entry for a parallel region is `GOMP_parallel(function, data, num_threads, flags)`, the one that compilers
call (GCC's libgomp manual, "Implementing PARALLEL construct").
"""

import ctypes
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

_MAPS = Path("/proc/self/maps")
# The two addresses of the pool's functions come first (codegen/numba_kernel.py).
_FIRST_ARGUMENT = 2
# Numbers of a kernel's table.
TABLE_SIZE = 24


class _Pool:
    """The entries of a loaded libgomp."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.parallel = library.GOMP_parallel
        self.parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self.parallel.restype = None
        self.thread_num_address = _address_of(library.omp_get_thread_num)
        self.num_threads_address = _address_of(library.omp_get_num_threads)
        self.set_num_threads = library.omp_set_num_threads
        self.set_num_threads.argtypes, self.set_num_threads.restype = [ctypes.c_int], None
        self.barrier_address = _address_of(library.GOMP_barrier)


def _address_of(function: Any) -> int:
    return int(ctypes.cast(function, ctypes.c_void_p).value or 0)


@cache
def _find_pool() -> _Pool | None:
    """Return the pool that torch uses, None where it is not GNU's or is not certain."""
    try:
        # Six fields, of which the last, a path, may hold blanks (proc(5)).
        lines = [line.split(maxsplit=5) for line in _MAPS.read_text().splitlines() if "libgomp" in line]
        mapped = {fields[-1] for fields in lines}
    except OSError:
        return None
    ours = {path for path in mapped if "/torch" in path} or mapped
    if len(ours) != 1:
        return None
    try:
        return _Pool(ctypes.CDLL(ours.pop()))
    except OSError:
        return None


def _pool_of_now() -> tuple[_Pool | None, int]:
    """Return the pool to run on, None for this thread alone, and how many threads it has."""
    num_threads = torch.get_num_threads()
    return (_find_pool() if num_threads > 1 else None), num_threads


def use_threads(num_threads: int) -> None:
    """Let this thread's operators and kernels run on a number of threads, and leave other threads theirs.

    `torch.set_num_threads` is for every thread that has not asked for its number yet, too. Where torch's pool
    is not known, nothing changes.
    """
    # The first time that a thread asks, torch sets its number.
    torch.get_num_threads()
    pool = _find_pool()
    if pool is not None:
        pool.set_num_threads(num_threads)


class Launcher:
    """Runs one kernel again and again, its table of arguments kept; for one thread at a time."""

    def __init__(self, address: int) -> None:
        self._address = address
        self._table = np.zeros(TABLE_SIZE, dtype=np.int64)
        self._pointer = self._table.ctypes.data
        self._alone = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)

    def run(self, arguments: Sequence[int], *, by_rows: bool = False) -> None:
        """Run the kernel over all its rows and return when it is done; in `recording` only write it down.

        Args:
            by_rows: as `Program.add` takes it.
        """
        program: Program | None = getattr(_RECORDING, "program", None)
        if program is not None:
            program.add(self._address, arguments, by_rows=by_rows)
            return
        pool, num_threads = _pool_of_now()
        self._table[_FIRST_ARGUMENT : _FIRST_ARGUMENT + len(arguments)] = arguments
        if pool is None:
            self._table[0] = 0
            self._alone(self._pointer)
            return
        self._table[0], self._table[1] = pool.thread_num_address, pool.num_threads_address
        pool.parallel(self._address, self._pointer, num_threads, 0)


class Program:
    """Kernels with their arguments, written down once and run one after another in a single call.

    What they read and write must stay where it was.

    Args:
        runner: address of the kernel `run_program`.
    """

    def __init__(self, runner: int) -> None:
        self._launcher = Launcher(runner)
        self._kernels: list[int] = []
        self._arguments: list[Sequence[int]] = []
        self._tables = np.zeros((0, TABLE_SIZE), dtype=np.int64)
        self._addresses = np.zeros(0, dtype=np.int64)
        # Of kernels that go by rows.
        self._num_rows: list[int] = []
        self._meets = np.zeros(0, dtype=np.int64)
        # The arrays' addresses, and the functions of the pool that the tables name.
        self._places: tuple[int, int, int] = (0, 0, 0)
        self._thread_functions = (0, 0)

    def add(self, kernel: int, arguments: Sequence[int], *, by_rows: bool = False) -> None:
        """Write a kernel down.

        Args:
            by_rows: whether the first argument is a number of rows, of which each thread takes the share that
                `numba_kernel.share` gives, and reads and writes what is of these alone.
        """
        self._kernels.append(kernel)
        self._arguments.append(arguments)
        self._num_rows.append(arguments[0] if by_rows else 0)

    def __len__(self) -> int:
        return len(self._kernels)

    def seal(self) -> None:
        """Make the tables; no kernel is added after."""
        self._addresses = np.array(self._kernels, dtype=np.int64)
        self._tables = np.zeros((len(self._kernels), TABLE_SIZE), dtype=np.int64)
        for table, arguments in zip(self._tables, self._arguments, strict=True):
            table[_FIRST_ARGUMENT : _FIRST_ARGUMENT + len(arguments)] = arguments
        self._arguments.clear()
        # A thread that continues with its own rows need not wait for the others.
        after = [*self._num_rows[1:], 0]
        meets = [not own or own != next_own for own, next_own in zip(self._num_rows, after, strict=True)]
        self._meets = np.array(meets, dtype=np.int64)
        arrays = (self._addresses, self._tables, self._meets)
        addresses, tables, meets_at = (one.ctypes.data for one in arrays)
        self._places = addresses, tables, meets_at

    def run(self) -> None:
        """Run all kernels in order and return when the last is done."""
        pool, _ = _pool_of_now()
        thread_functions = (0, 0) if pool is None else (pool.thread_num_address, pool.num_threads_address)
        if thread_functions != self._thread_functions:
            self._tables[:, :_FIRST_ARGUMENT] = self._thread_functions = thread_functions
        barrier = 0 if pool is None else pool.barrier_address
        addresses, tables, meets = self._places
        self._launcher.run((len(self._kernels), barrier, addresses, tables, meets))


_RECORDING = threading.local()


class _Launchers(threading.local):
    """A thread's launchers by the address of their kernel."""

    def __init__(self) -> None:
        self.by_address: dict[int, Launcher] = {}


_LAUNCHERS = _Launchers()


@contextmanager
def recording(runner: int) -> Iterator[Program]:
    """Write every kernel that this thread launches down, and run none.

    Args:
        runner: address of the kernel `run_program`.

    Yields:
        The program, which may be run afterwards.
    """
    program, outer = Program(runner), getattr(_RECORDING, "program", None)
    _RECORDING.program = program
    try:
        yield program
    finally:
        _RECORDING.program = outer
    program.seal()


def launch(address: int, arguments: Sequence[int]) -> None:
    """Run a kernel as this thread's launcher of it does."""
    launcher = _LAUNCHERS.by_address.get(address)
    if launcher is None:
        launcher = _LAUNCHERS.by_address[address] = Launcher(address)
    launcher.run(arguments)
