"""Fourier transforms of tiles as intrinsics, vectorised over channels, and the products between them.

A tile of SIDE_H x SIDE_W real inputs becomes `frequencies(SIDE_H, SIDE_W)` complex numbers and comes back as OUT_H x OUT_W
real outputs: rows first, then columns, and the other way round. Sides are even, or 1 along an axis that is not transformed.
The transform of a line is straight code, the algorithm of Cooley and Tukey (1965) by radices 4, 2, 3 and 5 and, of real
numbers, only the half of it that the other half mirrors.

Nothing here knows shapes, padding or caches; the kernel that calls these words does.
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from fractions import Fraction
from math import cos, pi, sin

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
    set_memory_kind,
    splat,
    stack_array,
    store_vector,
    vector,
)
from minicc.kernels.cpu.tiles import UNROLL, are_literals, heights, masked_load
from minicc.kernels.cpu.winograd_tiles import Arithmetic, prefetch

_WORDS = types.CPointer(types.int64)
_FLOATS = types.CPointer(types.float32)

# -- transforms of lines: complex numbers are pairs (real, imaginary) of what `on` computes with; None is 0


def _add(on, a, b):
    return tuple(y if x is None else x if y is None else on.add(x, y) for x, y in zip(a, b))


def _sub(on, a, b):
    return tuple(None if x is y else x if y is None else on.negative(y) if x is None else on.sub(x, y) for x, y in zip(a, b))


def _conjugate(on, a):
    return a[0], None if a[1] is None else on.negative(a[1])


def _quarter(on, a):
    """-i * a"""
    return a[1], None if a[0] is None else on.negative(a[0])


def _scale_add(on, factor, a, b):
    """factor * a + b, of a real factor"""
    scaled = zip(a, b)
    return tuple(y if x is None else on.scale(factor, x) if y is None else on.scale_add(factor, x, y) for x, y in scaled)


def _turned(on, a, turns):
    """a * exp(-2 pi i turns), of a fraction."""
    turns %= 1
    if turns >= Fraction(1, 2):
        turns, a = turns - Fraction(1, 2), _sub(on, (None, None), a)
    if turns >= Fraction(1, 4):
        turns, a = turns - Fraction(1, 4), _quarter(on, a)
    if turns == 0:
        return a
    along, across = cos(2 * pi * turns), sin(2 * pi * turns)
    real, imaginary = a
    return _scale_add(
        on, across, (imaginary, None if real is None else on.negative(real)), _scale_add(on, along, a, (None, None))
    )


def _butterfly(on, z):
    """The transform of 2, 3, 4 or 5 numbers."""
    if len(z) == 2:
        return [_add(on, *z), _sub(on, *z)]
    if len(z) == 4:
        (even, odd), (other_even, other_odd) = _butterfly(on, z[0::2]), _butterfly(on, z[1::2])
        turned = _quarter(on, other_odd)
        return [_add(on, even, other_even), _add(on, odd, turned), _sub(on, even, other_even), _sub(on, odd, turned)]
    # Of an odd number of them, the terms of j and -j have the same cosine and opposite sines.
    size = len(z)
    sums = [_add(on, z[j], z[-j]) for j in range(1, size // 2 + 1)]
    differences = [_quarter(on, _sub(on, z[j], z[-j])) for j in range(1, size // 2 + 1)]
    result = [z[0]] * size
    for total in sums:
        result[0] = _add(on, result[0], total)
    for k in range(1, size // 2 + 1):
        even, odd = z[0], (None, None)
        for j, (total, difference) in enumerate(zip(sums, differences), 1):
            even = _scale_add(on, cos(2 * pi * j * k / size), total, even)
            odd = _scale_add(on, sin(2 * pi * j * k / size), difference, odd)
        result[k], result[-k] = _add(on, even, odd), _sub(on, even, odd)
    return result


def _radix(size):
    return next(p for p in (4, 2, 3, 5) if size % p == 0)


def transform(on, line, real):
    """All frequencies of a line; of a real one those up to the middle."""
    size = len(line)
    if size == 1:
        return line
    radix = _radix(size)
    apart = size // radix
    parts = [transform(on, line[j::radix], real) for j in range(radix)]
    found: dict[int, object] = {}
    for k in range(apart // 2 + 1 if real else apart):
        terms = [_turned(on, part[k], Fraction(j * k, size)) for j, part in enumerate(parts)]
        for q, value in enumerate(_butterfly(on, terms)):
            at = k + q * apart
            mirrored = real and 2 * at > size
            found.setdefault(size - at if mirrored else at, _conjugate(on, value) if mirrored else value)
    return [found[k] for k in sorted(found)]


def transform_back(on, line, size, real):
    """The line of `size` numbers, times `size`, that has these frequencies; of a real line, those up to the middle."""
    if size == 1:
        return [(line[0][0], None)] if real else line
    radix = _radix(size)
    apart = size // radix
    if real:
        line = [*line, *(_conjugate(on, line[size - k]) for k in range(size // 2 + 1, size))]
    parts: list[list[object]] = [[] for _ in range(radix)]
    for k in range(apart // 2 + 1 if real else apart):
        # Backwards is forwards with real and imaginary parts exchanged.
        terms = _butterfly(on, [line[k + q * apart][::-1] for q in range(radix)])
        for j, value in enumerate(terms):
            along, across = _turned(on, value, Fraction(j * k, size))[::-1]
            # The first frequency of a real line, and the middle one, are real.
            parts[j].append((along, None if real and 2 * k in (0, apart) else across))
    lines = [transform_back(on, part, apart, real) for part in parts]
    return [lines[at % radix][at // radix] for at in range(size)]


# -- transforms of tiles


def _columns(builder, width):
    """(columns whose transform is that of real numbers: how many, their distance; complex ones: from, to)"""
    return (1, 1, 1, 1) if width == 1 else (2, width // 2, 1, width // 2)


class _Lines:
    """Half-transformed lines of a tile: [line][width + 2][VW] floats of scratch memory."""

    def __init__(self, builder, memory, width, lanes):
        self.builder, self.memory, self.size, self.lanes = builder, memory, width + 2, lanes

    def _at(self, line, column, part):
        number = self.builder.add(self.builder.mul(line, I64(self.size)), self.builder.shl(column, I64(1)))
        return self.builder.gep(self.memory, [self.builder.mul(self.builder.add(number, I64(part)), I64(self.lanes))])

    def load(self, line, column, part):
        return load_vector(self.builder, self._at(line, column, part), self.lanes, "scratch", 4 * self.lanes)

    def store(self, line, column, value):
        for part, vector_ in enumerate(value):
            if vector_ is not None:
                store_vector(self.builder, vector_, self._at(line, column, part), "scratch", 4 * self.lanes)


@intrinsic
def fft_input(typing_context, height, width, lanes, few, addresses, channels, lines, result, step):
    """Into Fourier's form: result[(2 * frequency + part) * step + c], parts real and imaginary, for c < channels.

    height, width, lanes, few: literals SIDE_H, SIDE_W, VW and whether channels < VW; then c < VW is written.
    addresses: int64 [SIDE_H * SIDE_W] byte addresses of the tile's input pixels (float32, channels contiguous).
    lines:     float32 scratch [SIDE_H][SIDE_W + 2][VW]; result: float32 scratch.
    """
    if not are_literals(height, width, lanes, few):
        return None
    tall, wide, vw, masked = (value.literal_value for value in (height, width, lanes, few))

    def emit(context, builder, signature, values):
        table, channels, memory, result, step = values[4:]
        on, lines = Arithmetic(builder, vw), _Lines(builder, memory, wide, vw)
        zero = constant(vector(F32, vw), 0.0)
        last = builder.sub(channels, I64(vw))
        numbers = ir.Constant(vector(I32, vw), [I32(n) for n in range(vw)])
        mask = builder.icmp_signed("<", numbers, splat(builder, builder.trunc(channels, I32), vw))

        def pixel(line, column, c):
            place = builder.gep(table, [builder.add(builder.mul(line, I64(wide)), I64(column))])
            address = set_memory_kind(builder, builder.load(place), "scratch")
            at = builder.gep(builder.inttoptr(address, F32.as_pointer()), [c])
            if masked:
                return set_memory_kind(builder, masked_load(builder, at, vw, mask), "input")
            return load_vector(builder, at, vw, "input")

        def store(frequency, count, value):
            at = builder.gep(result, [builder.mul(builder.shl(builder.add(frequency, I64(count)), I64(1)), step)])
            for part in value:
                store_vector(builder, zero if part is None else part, builder.gep(at, [c]), "scratch")
                at = builder.gep(at, [step])

        with counted_loop(builder, I64(0), channels, vw) as start:
            # What is left of the channels is done with a vector that overlaps the one before.
            c = I64(0) if masked else builder.select(builder.icmp_signed("<", start, last), start, last)
            with counted_loop(builder, I64(0), I64(tall)) as line:
                found = transform(on, [(pixel(line, s, c), None) for s in range(wide)], True)
                for k, value in enumerate(found):
                    lines.store(line, I64(k), value)
            count, apart, begin, end = _columns(builder, wide)
            with counted_loop(builder, I64(0), I64(count)) as number:
                column = builder.mul(number, I64(apart))
                found = transform(on, [(lines.load(I64(r), column, 0), None) for r in range(tall)], True)
                for k, value in enumerate(found):
                    store(builder.mul(number, I64(len(found))), k, value)
            first = count * (tall // 2 + 1)
            with counted_loop(builder, I64(begin), I64(end)) as column:
                found = [(lines.load(I64(r), column, 0), lines.load(I64(r), column, 1)) for r in range(tall)]
                for k, value in enumerate(transform(on, found, False)):
                    store(builder.mul(builder.sub(column, I64(begin)), I64(tall)), first + k, value)
        return context.get_dummy_value()

    literals = [types.literal(value) for value in (tall, wide, vw, masked)]
    return types.void(*literals, _WORDS, types.int64, _FLOATS, _FLOATS, types.int64), emit


@intrinsic
def fft_columns_back(typing_context, height, width, out, lanes, products, step, lines):
    """The columns of a tile out of Fourier's form: the first `out` lines.

    height, width, out, lanes: literals SIDE_H, SIDE_W, OUT_H and VW.
    products: float32 scratch, VW columns of `fft_input`'s form; lines: float32 scratch [OUT_H][SIDE_W + 2][VW].
    Both, and `step`, are aligned to a vector.
    """
    if not are_literals(height, width, out, lanes):
        return None
    tall, wide, rows, vw = (value.literal_value for value in (height, width, out, lanes))

    def emit(context, builder, signature, values):
        products, step, memory = values[4:]
        on, lines = Arithmetic(builder, vw), _Lines(builder, memory, wide, vw)

        def load(first, k, part):
            number = builder.add(builder.shl(builder.add(first, I64(k)), I64(1)), I64(part))
            return load_vector(builder, builder.gep(products, [builder.mul(number, step)]), vw, "scratch", 4 * vw)

        count, apart, begin, end = _columns(builder, wide)
        half = tall // 2 + 1
        with counted_loop(builder, I64(0), I64(count)) as number:
            first = builder.mul(number, I64(half))
            # The first and the middle one of a real line are real.
            parts = [(load(first, k, 0), None if 2 * k in (0, tall) else load(first, k, 1)) for k in range(half)]
            for r, value in enumerate(transform_back(on, parts, tall, True)[:rows]):
                lines.store(I64(r), builder.mul(number, I64(apart)), value)
        with counted_loop(builder, I64(begin), I64(end)) as column:
            first = builder.add(builder.mul(builder.sub(column, I64(begin)), I64(tall)), I64(count * half))
            parts = [(load(first, k, 0), load(first, k, 1)) for k in range(tall)]
            for r, value in enumerate(transform_back(on, parts, tall, False)[:rows]):
                lines.store(I64(r), column, value)
        return context.get_dummy_value()

    literals = [types.literal(value) for value in (tall, wide, rows, vw)]
    return types.void(*literals, _FLOATS, types.int64, _FLOATS), emit


@intrinsic
def fft_row_back(typing_context, width, out, lanes, lines, row, result):
    """One line of outputs, result [OUT_W][VW], from the lines of `fft_columns_back`.

    width, out, lanes: literals SIDE_W, OUT_W and VW. lines, result: float32 scratch.
    """
    if not are_literals(width, out, lanes):
        return None
    wide, columns, vw = (value.literal_value for value in (width, out, lanes))

    def emit(context, builder, signature, values):
        memory, row, result = values[3:]
        on, lines = Arithmetic(builder, vw), _Lines(builder, memory, wide, vw)
        parts = [
            (lines.load(row, I64(k), 0), None if 2 * k in (0, wide) else lines.load(row, I64(k), 1)) for k in range(wide // 2 + 1)
        ]
        for column, (value, _) in enumerate(transform_back(on, parts, wide, True)[:columns]):
            store_vector(builder, value, builder.gep(result, [I64(column * vw)]), "scratch", 4 * vw)
        return context.get_dummy_value()

    literals = [types.literal(value) for value in (wide, columns, vw)]
    return types.void(*literals, _FLOATS, types.int64, _FLOATS), emit


# -- products


@intrinsic
def frequency_tile(typing_context, rows, lanes, height, left, part, stride, panel, depth, result, apart, ahead, step):
    """result[r, j] = sum over k < depth of left[r, k] * panel[k, j] in complex numbers, for r < height.

    rows, lanes: literals MR and VW. height: one of `heights(MR)`.
    left:   float32 scratch, left[r * stride + k] and, `part` behind it, the imaginary part.
    panel:  float32 [depth][2][VW]. result: float32 scratch [height][VW] and, `apart` behind it, the imaginary parts.
    ahead, step: meanwhile memory is fetched to L2: from the byte address `ahead` on, `step` bytes for each k.
    """
    if not are_literals(rows, lanes):
        return None
    mr, vw = rows.literal_value, lanes.literal_value

    def emit(context, builder, signature, values):
        chosen, operands = values[2], values[3:]
        done = builder.append_basic_block("tile.done")
        switch = builder.switch(chosen, done)
        for height in heights(mr):
            block = builder.append_basic_block(f"tile.{height}")
            switch.add_case(I64(height), block)
            builder.position_at_end(block)
            _emit_frequency_tile(builder, vw, height, *operands)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    literals = [types.literal(value) for value in (mr, vw)]
    size = types.int64
    return types.void(*literals, size, _FLOATS, size, size, _FLOATS, size, _FLOATS, size, size, size), emit


def _emit_frequency_tile(builder, vw, height, left, part, stride, panel, depth, result, apart, ahead, step):
    type_ = vector(F32, vw)
    places = [(r, p) for r in range(height) for p in range(2)]
    sums = {place: stack_array(builder, type_, 1) for place in places}
    for place in places:
        builder.store(constant(type_, 0.0), sums[place])
    starts = {}
    for r in range(height):
        starts[r, 0] = builder.gep(left, [builder.mul(stride, I64(r))])
        starts[r, 1] = builder.gep(starts[r, 0], [part])
    whole = builder.and_(depth, I64(-UNROLL))
    lines = max(1, 2 * vw * 4 // 64)  # of a cache, that one k takes
    line = builder.udiv(step, I64(lines))

    def add(place, factor, value):
        builder.store(fma(builder, factor, value, builder.load(sums[place])), sums[place])

    def multiply(k, steps):
        for u in range(steps):
            at = builder.add(k, I64(u))
            b = builder.gep(panel, [builder.mul(at, I64(2 * vw))])
            real, imaginary = (load_vector(builder, builder.gep(b, [I64(p * vw)]), vw, "input") for p in range(2))
            fetched = builder.add(ahead, builder.mul(at, step))
            for _ in range(lines):
                prefetch(builder, fetched)
                fetched = builder.add(fetched, line)
            for r in range(height):
                pair = []
                for p in range(2):
                    scalar = set_memory_kind(builder, builder.load(builder.gep(starts[r, p], [at])), "scratch")
                    pair.append(splat(builder, scalar, vw))
                add((r, 0), pair[0], real)
                add((r, 1), pair[0], imaginary)
                add((r, 0), builder.fneg(pair[1]), imaginary)
                add((r, 1), pair[1], real)

    with counted_loop(builder, I64(0), whole, UNROLL) as k:
        multiply(k, UNROLL)
    with counted_loop(builder, whole, depth) as k:
        multiply(k, 1)
    for r, p in places:
        at = builder.gep(result, [builder.add(I64(r * vw), builder.mul(apart, I64(p)))])
        store_vector(builder, builder.load(sums[r, p]), at, "scratch", 4 * vw)
