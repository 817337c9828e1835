"""The tiles of convolutions whose taps along a line are known when they are compiled.

Narrow groups: some neighbouring pixels of one line of output, for one vector of channels at a time: the sums of all
pixels and the weights of one line of taps stay in registers, and every input is loaded once per line of taps for all
the pixels that it reaches. In groups of several channels, each channel in turn is spread over the lanes of its group.
Few input channels: a product of some neighbouring pixels of one line by a panel of output channels.
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from minicc.kernels.cpu.intrinsics import (
    F32,
    I32,
    I64,
    constant,
    counted_loop,
    fma,
    load_vector,
    splat,
    stack_array,
    store_vector,
    vector,
)
from minicc.kernels.cpu.tiles import are_literals, channel_masks, masked_load

_FLOATS = types.CPointer(types.float32)


@intrinsic
def line_tile(typing_context, pixels, columns, width, taps, step, apart, group, line, valid, weights, tile, lines):
    """tile[r, j] = sum over h < lines, g < group, t < taps of
                    (position r * step + t * apart of line h)[j - j % group + g] * weights[h][g][t][j].

    pixels, columns, width, taps, step, apart: literals: r < pixels, NR, VW, taps of a line, positions between pixels and
             between taps.
    group:   literal, a divisor of VW.
    line:    tuple (address of position 0 of line 0; bytes between positions, between lines; position 0 counted along
             the whole line, its extent; address of zeros; whether all positions are inside). Others read the zeros.
    valid:   columns that may be read.
    weights: float32 [lines][group][taps][NR].
    tile:    float32 scratch [pixels][NR].
    """
    if not are_literals(pixels, columns, width, taps, step, apart, group) or not isinstance(line, types.BaseTuple):
        return None
    known = [value.literal_value for value in (pixels, columns, width, taps, step, apart, group)]

    def emit(context, builder, signature, values):
        line, valid, weights, tile, lines = values[7:]
        *facts, inside = [builder.extract_value(line, i) for i in range(7)]
        columns, width = known[1:3]
        whole = builder.icmp_signed(">=", valid, I64(columns))
        with builder.if_else(builder.and_(whole, builder.icmp_signed("!=", inside, I64(0)))) as (free, careful):
            with free:
                _emit(builder, known, facts, weights, tile, lines, False, None)
            with careful, builder.if_else(whole) as (then, otherwise):
                with then:
                    _emit(builder, known, facts, weights, tile, lines, True, None)
                with otherwise:
                    masks = channel_masks(builder, columns, width, valid)
                    _emit(builder, known, facts, weights, tile, lines, True, masks)
        return context.get_dummy_value()

    kinds = [types.literal(value) for value in known]
    facts = types.UniTuple(types.int64, 7)
    return types.void(*kinds, facts, types.int64, _FLOATS, _FLOATS, types.int64), emit


def _emit(builder, known, facts, weights, tile, lines, check, masks):
    pixels, columns, width, taps, step, apart, group = known
    x, position_step, line_step, first, extent, zeros = facts
    readers: dict[int, list[tuple[int, int]]] = {}  # of each position: which pixels read it, under which tap
    for r in range(pixels):
        for t in range(taps):
            readers.setdefault(r * step + t * apart, []).append((r, t))
    # Unsigned, so that negative positions are too large.
    inside = {p: builder.icmp_unsigned("<", builder.add(first, I64(p)), extent) for p in sorted(readers) if check}
    type_ = vector(F32, width)

    def add(sums, channel, line, padding, factors, mask):
        """One channel of the groups: its products with a line of taps are added to the sums."""
        totals = [builder.load(place) for place in sums]
        for p in sorted(readers):
            address = builder.add(line, builder.mul(position_step, I64(p)))
            source = builder.select(inside[p], address, padding) if check else address
            value = _spread(builder, builder.inttoptr(source, F32.as_pointer()), width, group, channel, mask)
            for r, t in readers[p]:
                totals[r] = fma(builder, value, factors[t], totals[r])
        for place, total in zip(sums, totals):
            builder.store(total, place)

    for v in range(columns // width):
        sums = [stack_array(builder, type_, 1) for _ in range(pixels)]
        for place in sums:
            builder.store(constant(type_, 0.0), place)
        shift = I64(4 * v * width)
        padding = builder.add(zeros, shift)
        with counted_loop(builder, I64(0), lines) as h:
            line = builder.add(builder.add(x, shift), builder.mul(h, line_step))
            row = builder.gep(weights, [builder.mul(h, I64(group * taps * columns))])

            def channel_weights(channel, row=row, v=v):
                at = builder.gep(row, [builder.mul(channel, I64(taps * columns))])
                places = [builder.gep(at, [I64(t * columns + v * width)]) for t in range(taps)]
                return [load_vector(builder, place, width, "input") for place in places]

            mask = masks and masks[v]
            if group == width:  # a loop, as every channel fills the vector in the same way
                with counted_loop(builder, I64(0), I64(group)) as channel:
                    add(sums, channel, line, padding, channel_weights(channel), mask)
            else:
                for channel in map(I64, range(group)):
                    add(sums, channel, line, padding, channel_weights(channel), mask)
        for r, place in enumerate(sums):
            at = builder.gep(tile, [I64(r * columns + v * width)])
            store_vector(builder, builder.load(place), at, "scratch", 4 * width)


def _spread(builder, pointer, width, group, channel, mask):
    """A vector whose lanes hold, of the vector at `pointer`, one channel of their group; masked lanes are not read."""
    if group == width:
        return splat(builder, builder.load(builder.gep(pointer, [channel])), width)
    value = load_vector(builder, pointer, width) if mask is None else masked_load(builder, pointer, width, mask)
    if group == 1:
        return value
    lanes = [lane - lane % group + channel.constant for lane in range(width)]
    return builder.shuffle_vector(value, value, ir.Constant(vector(I32, width), [I32(lane) for lane in lanes]))


@intrinsic
def few_tile(typing_context, pixels, columns, width, taps, step, channels, planes, line, weights, tile, lines):
    """tile[r, j] = sum over h < lines, t < taps, c < channels of
                    (position r * step + t of line h)[c] * weights[h][t][c][j].

    pixels, columns, width, taps, step, channels: literals: r < pixels, NR, VW, taps of a line, positions between pixels,
             input channels.
    planes:  literal: 0 when the channels of a position lie side by side, else every channel is a plane.
    line:    tuple (address of position 0 of line 0; bytes between lines, between planes; position 0 counted along the
             whole line, its extent; address of zeros; whether all positions are inside). Others read a zero.
    weights: float32 [lines][taps][channels][NR].
    tile:    float32 scratch [pixels][NR].
    """
    known = (pixels, columns, width, taps, step, channels, planes)
    if not are_literals(*known) or not isinstance(line, types.BaseTuple):
        return None
    numbers = [value.literal_value for value in known]

    def emit(context, builder, signature, values):
        line, weights, tile, lines = values[7:]
        *facts, inside = [builder.extract_value(line, i) for i in range(7)]
        with builder.if_else(builder.icmp_signed("!=", inside, I64(0))) as (free, careful):
            with free:
                _emit_few(builder, numbers, facts, weights, tile, lines, False)
            with careful:
                _emit_few(builder, numbers, facts, weights, tile, lines, True)
        return context.get_dummy_value()

    kinds = [types.literal(value) for value in numbers]
    facts = types.UniTuple(types.int64, 7)
    return types.void(*kinds, facts, _FLOATS, _FLOATS, types.int64), emit


def _emit_few(builder, known, facts, weights, tile, lines, check):
    pixels, nr, width, taps, step, channels, planes = known
    x, line_step, plane_step, first, extent, zeros = facts
    padding = builder.inttoptr(zeros, F32.as_pointer())
    inside = []
    if check:
        # Unsigned, so that negative positions are too large.
        positions = range((pixels - 1) * step + taps)
        inside = [builder.icmp_unsigned("<", builder.add(first, I64(p)), extent) for p in positions]
    type_ = vector(F32, width)
    vectors = range(nr // width)
    sums = [[stack_array(builder, type_, 1) for _ in vectors] for _ in range(pixels)]
    for row in sums:
        for place in row:
            builder.store(constant(type_, 0.0), place)
    with counted_loop(builder, I64(0), lines) as h:
        line = builder.add(x, builder.mul(h, line_step))
        factors = builder.gep(weights, [builder.mul(h, I64(taps * channels * nr))])
        for c in range(channels):
            start = builder.add(line, builder.mul(plane_step, I64(c))) if planes else builder.add(line, I64(4 * c))
            start = builder.inttoptr(start, F32.as_pointer())
            for t in range(taps):
                at = (t * channels + c) * nr
                places = [builder.gep(factors, [I64(at + v * width)]) for v in vectors]
                right = [load_vector(builder, place, width, "input") for place in places]
                for r, row in enumerate(sums):
                    p = r * step + t
                    source = builder.gep(start, [I64(p if planes else p * channels)])
                    source = builder.select(inside[p], source, padding) if check else source
                    left = splat(builder, builder.load(source), width)
                    for place, weight in zip(row, right):
                        builder.store(fma(builder, left, weight, builder.load(place)), place)
    for r, row in enumerate(sums):
        for v, place in enumerate(row):
            at = builder.gep(tile, [I64(r * nr + v * width)])
            store_vector(builder, builder.load(place), at, "scratch", 4 * width)
