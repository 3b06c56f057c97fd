"""LLVM's vectors of 16 float32 over float32 or bfloat16 memory, loops over them, and processor features.

The compiler's own vectors stop at a conversion of bits in the middle of a sum. All addresses are int64 and
`like` is a kernel's typed pointer, which says what the rows hold.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"

from collections.abc import Callable
from inspect import signature
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic, overload

I64, I32, I16, F32 = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.FloatType()
LANES = 16
VECTOR, WIDE_BITS, HALVES = (ir.VectorType(kind, LANES) for kind in (F32, I32, I16))


def has_feature(name: str) -> bool:
    """Whether kernels are compiled for a processor with a feature, by LLVM's name for it.

    Not whether the processor has it: `NUMBA_CPU_FEATURES` may leave it out, and the compiler would crash.
    """
    asked = numba.config.CPU_FEATURES
    features: str = get_host_cpu_features() if asked is None else asked
    return f"+{name}" in features.split(",")


# Whether there are products of bfloat16 pairs, and an instruction that rounds 16 numbers to bfloat16.
HAS_PAIRS = has_feature("avx512bf16")
# Whether there is a matrix unit (Intel AMX), which oneDNN's products use.
HAS_UNIT = has_feature("amx-tile") and has_feature("amx-bf16")


def emitted(result: Any = types.int64, **kinds: Any) -> Callable[[Callable[..., Any]], Any]:
    """Make a function that emits code into one that kernels call (numba's `intrinsic`).

    Its arguments after the builder are LLVM values, of int64 but for `kinds`. Of one named `like`, a kernel's
    pointer, it gets numba's type alone. Where it returns no value, 0 is returned.
    """

    def decorate(emit: Callable[..., Any]) -> Any:
        names = list(signature(emit).parameters)[1:]

        def definition(_context: Any, *given: Any) -> Any:
            by_name = dict(zip(names, given, strict=True))

            def generate(_target: Any, builder: Any, _signature: Any, values: Any) -> Any:
                operands = [
                    by_name["like"] if name == "like" else value
                    for name, value in zip(names, values, strict=True)
                ]
                value = emit(builder, *operands)
                return I64(0) if value is None else value

            own = [by_name["like"] if name == "like" else kinds.get(name, types.int64) for name in names]
            return result(*own), generate

        definition.__name__, definition.__doc__ = emit.__name__, emit.__doc__
        definition.__signature__ = signature(emit)  # type: ignore[attr-defined]
        return intrinsic(definition)

    return decorate


class BFloat16(ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def _to_string(self) -> str:
        return "bfloat"


def item_size(like):
    """Return the bytes of one number."""


@overload(item_size, inline="always")
def _item_size_overload(like):
    size = 2 if like.dtype == types.uint16 else 4
    return lambda like: size  # noqa: ARG005


def call(builder: ir.IRBuilder, name: str, result: ir.Type, arguments: list[ir.Value]) -> ir.Value:
    """Call one of the compiler's own functions by its whole name."""
    function = builder.module.globals.get(name)
    if function is None:
        kind = ir.FunctionType(result, [one.type for one in arguments])
        function = ir.Function(builder.module, kind, name=name)
    return builder.call(function, arguments)


def prefetch(builder: ir.IRBuilder, place: ir.Value, *, is_nearest: bool = True) -> None:
    """Ask for a line of memory that is read soon: into the nearest cache, or the one behind it."""
    call(builder, "llvm.prefetch.p0", ir.VoidType(), [place, I32(0), I32(3 if is_nearest else 2), I32(1)])


def constant(kind: ir.Type, number: float) -> ir.Constant:
    """Return a number of a type, or 16 of them where the type is a vector."""
    return ir.Constant(kind, [number] * LANES if isinstance(kind, ir.VectorType) else number)


def rounded_bits(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """Return the bits of float32 with the nearest bfloat16, of two the even one, in their upper half."""
    odd = builder.and_(builder.lshr(bits, constant(bits.type, 16)), constant(bits.type, 1))
    return builder.add(bits, builder.add(odd, constant(bits.type, 0x7FFF)))


def to_bfloat16(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Return the bits of the bfloat16 nearest to a float32, or to 16, of two equally near the even one.

    The processor's own instruction takes what is nearer to 0 than normal numbers are for 0.
    """
    is_vector = isinstance(value.type, ir.VectorType)
    halves, bits = (HALVES, WIDE_BITS) if is_vector else (I16, I32)
    # Of one number by its bits: the compiler makes more of a loop of these.
    if HAS_PAIRS and is_vector:
        return builder.bitcast(builder.fptrunc(value, ir.VectorType(BFloat16(), LANES)), halves)
    upper = builder.lshr(rounded_bits(builder, builder.bitcast(value, bits)), constant(bits, 16))
    return builder.trunc(upper, halves)


class Memory:
    """Numbers of one type in memory, read and written as float32.

    Args:
        is_bfloat16: whether they are bfloat16, else float32.
    """

    def __init__(self, builder: ir.IRBuilder, *, is_bfloat16: bool) -> None:
        self._builder = builder
        self._is_bfloat16 = is_bfloat16
        self._size = 2 if is_bfloat16 else 4
        self._held: ir.Type = I16 if is_bfloat16 else F32
        self._name = "v16i16.p0" if is_bfloat16 else "v16f32.p0"

    def load(self, address: ir.Value, index: ir.Value, lanes: int) -> ir.Value:
        """Return `lanes` numbers from an index on as one float32 vector, or one float32."""
        return self._widen(self.load_bits(address, index, lanes), lanes)

    def load_some(self, address: ir.Value, index: ir.Value, mask: ir.Value) -> ir.Value:
        """Return 16 numbers as `load` does, 0 where the mask is unset: memory is not read there."""
        held = ir.VectorType(self._held, LANES)
        arguments = [
            self._pointer(address, index, held),
            I32(self._size),
            mask,
            ir.Constant(held, [self._held(0)] * LANES),
        ]
        return self._widen(call(self._builder, f"llvm.masked.load.{self._name}", held, arguments), LANES)

    def store(self, value: ir.Value, address: ir.Value, index: ir.Value) -> None:
        """Write a float32 or a vector of 16, each as the nearest number of this memory."""
        self.store_bits(self._narrow(value), address, index)

    def store_some(self, value: ir.Value, address: ir.Value, index: ir.Value, mask: ir.Value) -> None:
        """Write 16 numbers as `store` does, but where the mask is unset."""
        narrow = self._narrow(value)
        place = self._pointer(address, index, narrow.type)
        arguments = [narrow, place, I32(self._size), mask]
        call(self._builder, f"llvm.masked.store.{self._name}", ir.VoidType(), arguments)

    def load_bits(self, address: ir.Value, index: ir.Value, lanes: int) -> ir.Value:
        """Return one number or 16 as they are held."""
        held = self._held if lanes == 1 else ir.VectorType(self._held, lanes)
        return self._builder.load(self._pointer(address, index, held), align=self._size)

    def store_bits(self, held: ir.Value, address: ir.Value, index: ir.Value) -> None:
        """Write what `load_bits` returned."""
        self._builder.store(held, self._pointer(address, index, held.type), align=self._size)

    def prefetch(self, address: ir.Value, index: ir.Value) -> None:
        """Ask for a line of memory that is read soon."""
        prefetch(self._builder, self._pointer(address, index, ir.IntType(8)))

    def _widen(self, held: ir.Value, lanes: int) -> ir.Value:
        """Return what is held as float32."""
        if not self._is_bfloat16:
            return held
        builder = self._builder
        wide = I32 if lanes == 1 else WIDE_BITS
        bits = builder.shl(builder.zext(held, wide), constant(wide, 16))
        return builder.bitcast(bits, F32 if lanes == 1 else VECTOR)

    def _narrow(self, value: ir.Value) -> ir.Value:
        """Return float32 as it is held: of two equally near bfloat16 the even one."""
        return to_bfloat16(self._builder, value) if self._is_bfloat16 else value

    def _pointer(self, address: ir.Value, index: ir.Value, held: ir.Type) -> ir.Value:
        builder = self._builder
        place = builder.add(address, builder.mul(index, I64(self._size)))
        return builder.inttoptr(place, held.as_pointer())


Body = Callable[[ir.Value, list[ir.Value]], list[ir.Value]]


def loop(
    builder: ir.IRBuilder, begin: ir.Value, end: ir.Value, step: int, carried: list[ir.Value], body: Body
) -> tuple[ir.Value, list[ir.Value]]:
    """Emit a loop while `index + step <= end`; return where it stopped and what it carried."""
    before = builder.block
    head, inside, after = (builder.append_basic_block() for _ in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(I64)
    index.add_incoming(begin, before)
    held = [builder.phi(value.type) for value in carried]
    for phi, value in zip(held, carried, strict=True):
        phi.add_incoming(value, before)
    builder.cbranch(builder.icmp_signed("<=", builder.add(index, I64(step)), end), inside, after)
    builder.position_at_end(inside)
    renewed = body(index, held)
    following = builder.add(index, I64(step))
    index.add_incoming(following, builder.block)
    for phi, value in zip(held, renewed, strict=True):
        phi.add_incoming(value, builder.block)
    builder.branch(head)
    builder.position_at_end(after)
    return index, held


def over(
    builder: ir.IRBuilder, begin: ir.Value, end: ir.Value, emit: Callable[[ir.Value, int], None]
) -> None:
    """Emit code for 16 numbers at a time, by the index of the first, and then for each of the rest."""
    index = begin
    for lanes in (LANES, 1):

        def body(index: ir.Value, _: list[ir.Value], lanes: int = lanes) -> list[ir.Value]:
            emit(index, lanes)
            return []

        index, _ = loop(builder, index, end, lanes, [], body)


def for_count(builder: ir.IRBuilder, count: ir.Value, most: int, emit: Callable[[int], None]) -> None:
    """Emit code for each number from 1 to the most; that of `count` runs."""
    after = builder.append_basic_block()
    blocks = [builder.append_basic_block() for _ in range(most)]
    switch = builder.switch(count, blocks[-1])
    for number, block in enumerate(blocks, 1):
        switch.add_case(I64(number), block)
        builder.position_at_end(block)
        emit(number)
        builder.branch(after)
    builder.position_at_end(after)


def reduced(
    builder: ir.IRBuilder, vector: ir.Value, combine: Callable[[ir.Value, ir.Value], ir.Value]
) -> ir.Value:
    """Return a vector with all 16 numbers combined in each of its lanes, halves with halves."""
    for step in (8, 4, 2, 1):
        others = ir.Constant(WIDE_BITS, [lane ^ step for lane in range(LANES)])
        vector = combine(builder.shuffle_vector(vector, vector, others), vector)
    return vector


def sum_lanes(builder: ir.IRBuilder, vector: ir.Value) -> ir.Value:
    """Return the sum of a vector's 16 numbers."""
    return builder.extract_element(reduced(builder, vector, builder.fadd), I32(0))


def broadcast(builder: ir.IRBuilder, value: ir.Value) -> ir.Value:
    """Return a vector of one number 16 times."""
    single = ir.Constant(ir.VectorType(value.type, LANES), ir.Undefined)
    vector = builder.insert_element(single, value, I32(0))
    return builder.shuffle_vector(vector, vector, constant(WIDE_BITS, 0))


def number_of_bits(builder: ir.IRBuilder, bits: ir.Value) -> ir.Value:
    """Return a float32, by its bits in an int64, 16 times."""
    return broadcast(builder, builder.bitcast(builder.trunc(bits, I32), F32))


def multiply_add(builder: ir.IRBuilder, a: ir.Value, b: ir.Value, total: ir.Value) -> ir.Value:
    """Return a times b plus a total, rounded once where the processor can."""
    product = builder.fmul(a, b, flags=("contract",))
    return builder.fadd(product, total, flags=("contract",))


def is_bfloat16(like: Any) -> bool:
    """Whether a kernel's pointer is to bfloat16."""
    return like.dtype == types.uint16


def lanes_below(builder: ir.IRBuilder, count: ir.Value, first: int = 0) -> ir.Value:
    """Return which of 16 lanes, from a first one on, are below a count."""
    lanes = ir.Constant(WIDE_BITS, [first + lane for lane in range(LANES)])
    return builder.icmp_signed("<", lanes, broadcast(builder, builder.trunc(count, I32)))


def row_starts(
    builder: ir.IRBuilder, source: ir.Value, stride: ir.Value, num_rows: ir.Value
) -> list[ir.Value]:
    """Return the addresses of 16 rows; for those that there are not, of the last one."""
    last = builder.sub(num_rows, I64(1))
    starts = []
    for row in range(LANES):
        own = builder.select(builder.icmp_signed("<", I64(row), last), I64(row), last)
        starts.append(builder.add(source, builder.mul(stride, own)))
    return starts


def transposed(builder: ir.IRBuilder, rows: list[ir.Value]) -> list[ir.Value]:
    """Return 16 vectors of 16 as their columns."""
    for width in (1, 2, 4, 8):
        # Of two rows at a distance of `width` the odd parts of the first change places with the even ones of
        # the second.
        low = [lane if not lane & width else LANES + lane - width for lane in range(LANES)]
        high = [lane + width if not lane & width else LANES + lane for lane in range(LANES)]
        found = list(rows)
        for number in range(LANES):
            if number & width:
                continue
            a, b = rows[number], rows[number + width]
            found[number] = builder.shuffle_vector(a, b, ir.Constant(WIDE_BITS, low))
            found[number + width] = builder.shuffle_vector(a, b, ir.Constant(WIDE_BITS, high))
        rows = found
    return rows
