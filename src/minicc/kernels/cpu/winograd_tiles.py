"""Winograd's transforms as intrinsics, vectorised over channels.

A tile of OUT outputs along an axis with TAPS taps reads SIDE = (OUT - 1) * STRIDE + TAPS inputs, and becomes as many products
over the channels; of two such axes, every input of one with every input of the other. What is here goes into and
comes out of that form, by the sums of kernels/winograd_axes.py; the weights go into it in packing.

Nothing here knows shapes, padding or caches; the kernel that calls these words does.
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from minicc.kernels.cpu.intrinsics import (
    F32,
    I8,
    I32,
    I64,
    constant,
    counted_loop,
    fma,
    load_vector,
    set_memory_kind,
    splat,
    stack_array,
    store_vector,
    vector,
)
from minicc.kernels.cpu.tiles import UNROLL, heights
from minicc.kernels.winograd_axes import into_form, out_of_form, positions

_WORDS = types.CPointer(types.int64)
_FLOATS = types.CPointer(types.float32)


class Arithmetic:
    """Sums and multiples of vectors."""

    def __init__(self, builder: ir.IRBuilder, width: int) -> None:
        self.builder, self.type = builder, vector(F32, width)

    def add(self, x, y):
        return self.builder.fadd(x, y)

    def sub(self, x, y):
        return self.builder.fsub(x, y)

    def negative(self, x):
        return self.builder.fneg(x)

    def scale(self, factor, x):
        return self.builder.fmul(constant(self.type, factor), x)

    def scale_add(self, factor, x, y):
        """factor * x + y"""
        return fma(self.builder, constant(self.type, factor), x, y)


@intrinsic
def winograd_input(typing_context, out_h, out_w, stride, taps, width, addresses, channels, result, step):
    """Into Winograd's form: result[position * step + c] for the SIDE_H * SIDE_W positions and c < channels.

    out_h, out_w, stride, taps, width: literals OUT_H, OUT_W, STRIDE, TAPS and VW; channels >= VW.
    addresses: int64 [SIDE_H * SIDE_W] byte addresses of the tile's input pixels (float32, channels contiguous).
    result:    float32 scratch.
    """
    if not all(isinstance(value, types.IntegerLiteral) for value in (out_h, out_w, stride, taps, width)):
        return None
    *shape, vw = [value.literal_value for value in (out_h, out_w, stride, taps, width)]

    def emit(context, builder, signature, values):
        table, channels, result, step = values[5:]
        on = Arithmetic(builder, vw)
        last = builder.sub(channels, I64(vw))
        with counted_loop(builder, I64(0), channels, vw) as start:
            # What is left of the channels is done with a vector that overlaps the one before.
            c = builder.select(builder.icmp_signed("<", start, last), start, last)
            pixels = []
            for number in range(positions(shape)):
                address = set_memory_kind(builder, builder.load(builder.gep(table, [I64(number)])), "scratch")
                pixel = builder.gep(builder.inttoptr(address, F32.as_pointer()), [c])
                pixels.append(load_vector(builder, pixel, vw, "input"))
            at = builder.gep(result, [c])
            for value in into_form(on, shape, pixels):
                store_vector(builder, value, at, "scratch")
                at = builder.gep(at, [step])
        return context.get_dummy_value()

    literals = [types.literal(value) for value in (*shape, vw)]
    return types.void(*literals, _WORDS, types.int64, _FLOATS, types.int64), emit


@intrinsic
def winograd_output(typing_context, out_h, out_w, stride, taps, columns, width, products, step, result):
    """Out of Winograd's form: result [OUT_H][OUT_W][NR] from products[position * step + j], j < NR.

    out_h, out_w, stride, taps, columns, width: literals OUT_H, OUT_W, STRIDE, TAPS, NR and VW.
    products, result: float32 scratch, aligned to a vector; so is `step`.
    """
    if not all(isinstance(value, types.IntegerLiteral) for value in (out_h, out_w, stride, taps, columns, width)):
        return None
    *shape, nr, vw = [value.literal_value for value in (out_h, out_w, stride, taps, columns, width)]

    def emit(context, builder, signature, values):
        products, step, result = values[6:]
        on = Arithmetic(builder, vw)
        with counted_loop(builder, I64(0), I64(nr), vw) as j:
            at = builder.gep(products, [j])
            sums = []
            for _ in range(positions(shape)):
                sums.append(load_vector(builder, at, vw, "scratch", 4 * vw))
                at = builder.gep(at, [step])
            at = builder.gep(result, [j])
            for value in out_of_form(on, shape, sums):
                store_vector(builder, value, at, "scratch", 4 * vw)
                at = builder.gep(at, [I64(nr)])
        return context.get_dummy_value()

    literals = [types.literal(value) for value in (*shape, nr, vw)]
    return types.void(*literals, _FLOATS, types.int64, _FLOATS), emit


@intrinsic
def position_tile(typing_context, rows, columns, width, height, left, stride, panel, depth, result, ahead, step):
    """result[r, j] = sum over k < depth of left[r * stride + k] * panel[k * NR + j], for r < height.

    rows, columns, width: literals MR, NR and VW. height: one of `heights(MR)`.
    left, result:  float32 scratch, result [height][NR]. panel: float32 [depth][NR].
    ahead, step:   meanwhile memory is fetched to L2: from the byte address `ahead` on, `step` bytes for each k.
    """
    if not all(isinstance(value, types.IntegerLiteral) for value in (rows, columns, width)):
        return None
    mr, nr, vw = rows.literal_value, columns.literal_value, width.literal_value

    def emit(context, builder, signature, values):
        chosen, left, stride, panel, depth, result, ahead, step = values[3:]
        done = builder.append_basic_block("tile.done")
        switch = builder.switch(chosen, done)
        for height in heights(mr):
            block = builder.append_basic_block(f"tile.{height}")
            switch.add_case(I64(height), block)
            builder.position_at_end(block)
            _emit_position_tile(builder, (nr, vw, height), left, stride, panel, depth, result, ahead, step)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    literals = [types.literal(value) for value in (mr, nr, vw)]
    size = types.int64
    return types.void(*literals, size, _FLOATS, size, _FLOATS, size, _FLOATS, size, size), emit


def prefetch(builder, address):
    """Fetch the cache line at a byte address to L2, to be read; any address will do."""
    type_ = ir.FunctionType(ir.VoidType(), [I8.as_pointer(), I32, I32, I32])
    function = cgutils.get_or_insert_function(builder.module, type_, "llvm.prefetch.p0")
    read, to_l2, data = I32(0), I32(2), I32(1)
    builder.call(function, [builder.inttoptr(address, I8.as_pointer()), read, to_l2, data])


def _emit_position_tile(builder, shape, left, stride, panel, depth, result, ahead, step):
    nr, vw, height = shape
    type_ = vector(F32, vw)
    vectors = range(nr // vw)
    places = [(r, v) for r in range(height) for v in vectors]
    sums = {place: stack_array(builder, type_, 1) for place in places}
    for place in places:
        builder.store(constant(type_, 0.0), sums[place])
    row = [builder.gep(left, [builder.mul(stride, I64(r))]) for r in range(height)]
    whole = builder.and_(depth, I64(-UNROLL))
    lines = max(1, nr * 4 // 64)  # of a cache, that one k takes
    line = builder.udiv(step, I64(lines))

    def multiply(k, steps):
        for u in range(steps):
            at = builder.add(k, I64(u))
            b = builder.gep(panel, [builder.mul(at, I64(nr))])
            right = [load_vector(builder, builder.gep(b, [I64(v * vw)]), vw, "input") for v in vectors]
            fetched = builder.add(ahead, builder.mul(at, step))
            for _ in range(lines):
                prefetch(builder, fetched)
                fetched = builder.add(fetched, line)
            for r in range(height):
                scalar = set_memory_kind(builder, builder.load(builder.gep(row[r], [at])), "scratch")
                factor = splat(builder, scalar, vw)
                for v in vectors:
                    builder.store(fma(builder, factor, right[v], builder.load(sums[r, v])), sums[r, v])

    with counted_loop(builder, I64(0), whole, UNROLL) as k:
        multiply(k, UNROLL)
    with counted_loop(builder, whole, depth) as k:
        multiply(k, 1)
    for r, v in places:
        store_vector(builder, builder.load(sums[r, v]), builder.gep(result, [I64(r * nr + v * vw)]), "scratch", 4 * vw)
