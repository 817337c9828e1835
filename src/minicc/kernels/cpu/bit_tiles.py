"""Tile intrinsics for right operands of few bits: numbers of 2, 4 or 8 bits, in blocks along k with a scale for each column.

A panel holds words of 32 bits, each with 32 / BITS consecutive k of one column, lowest bits first. A vector of words is taken
apart by shifts and masks, so that lanes are columns as in every other tile. A number q stands for (q - zero) * scale.
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from minicc.kernels.cpu.intrinsics import (
    F32,
    I32,
    I64,
    call_vector_intrinsic,
    constant,
    counted_loop,
    fma,
    load_vector,
    set_memory_kind,
    splat,
    stack_array,
    store_vector,
    type_suffix,
    vector,
)
from minicc.kernels.cpu.tiles import are_literals, heights

WORD = 32  # bits
INDEPENDENT = 4  # sums that hide the latency of fma
PART = 256  # numbers of a block whose left operand is prepared at once

_ADDRESSES = types.CPointer(types.int64)
_BITS = types.CPointer(types.int32)
_FLOATS = types.CPointer(types.float32)


def _numbers(builder, words, shift, bits):
    """The numbers at bit `shift` (an i32) of a vector of words, as floats."""
    width = words.type.count
    shifted = builder.lshr(words, splat(builder, shift, width))
    return builder.sitofp(builder.and_(shifted, constant(words.type, (1 << bits) - 1)), vector(F32, width))


def _in_place(builder, words, position, bits):
    """The numbers at a position of a vector of words, as floats, times 2**(bits * position) unless it is the last position.

    An instruction less: what is left where it is, is as exact, and the left operand can make good for it. At the last position
    a number would reach the sign.
    """
    if position == WORD // bits - 1:
        found = builder.lshr(words, constant(words.type, bits * position))
    else:
        found = builder.and_(words, constant(words.type, ((1 << bits) - 1) << (bits * position)))
    return builder.sitofp(found, vector(F32, words.type.count))


def _sum_of_lanes(builder, value):
    function = f"llvm.vector.reduce.fadd.{type_suffix(value.type)}"
    total = call_vector_intrinsic(builder, function, [constant(F32, 0.0), value], F32)
    total.fastmath.add("reassoc")
    return total


class _Few:
    """The sums of `height` rows times one panel, in registers."""

    def __init__(self, builder, shape, bits, size, depth, pointers):
        self.builder, self.bits, self.size, self.depth = builder, bits, size, depth
        _, self.nr, self.vw, self.height = shape
        self.rows, self.words, self.scales, self.zeros = pointers
        self.per_word, self.vectors = WORD // bits, self.nr // self.vw
        self.places = [(r, v) for r in range(self.height) for v in range(self.vectors)]
        self.copies = max(1, INDEPENDENT // len(self.places))
        self.totals = self.cells(self.places)
        self.fitted = [stack_array(builder, F32, PART) for _ in range(self.height)]

    def cells(self, keys, type_=None):
        """Memory for one vector per key, 0 at first, which LLVM turns into registers."""
        type_ = type_ or vector(F32, self.vw)
        found = {key: stack_array(self.builder, type_, 1) for key in keys}
        for cell in found.values():
            self.builder.store(constant(type_, 0.0), cell)
        return found

    def at(self, pointer, index, v):
        """The vector v of row `index` of an array of NR columns."""
        place = self.builder.add(self.builder.mul(index, I64(self.nr)), I64(v * self.vw))
        return load_vector(self.builder, self.builder.gep(pointer, [place]), self.vw, "input")

    def add(self, sums, right, left, copy):
        """sums[r, v] += left[r] * right[v]."""
        for r, v in self.places:
            cell = sums[r, v, copy]
            factor = splat(self.builder, left[r], self.vw)
            self.builder.store(fma(self.builder, factor, right[v], self.builder.load(cell)), cell)

    def fit(self, start, whole, values):
        """The left operand of whole words as `_in_place` wants it, and its sums by lanes in `values`."""
        builder, group = self.builder, vector(F32, self.per_word)
        powers = [2.0 ** (-self.bits * i) for i in range(self.per_word - 1)] + [1.0]
        factors = ir.Constant(group, [ir.Constant(F32, power) for power in powers])
        with counted_loop(builder, I64(0), whole) as number:
            at = builder.mul(number, I64(self.per_word))
            for r, row in enumerate(self.rows):
                # No alias scope: rows may lie in any memory.
                several = load_vector(builder, builder.gep(row, [builder.add(start, at)]), self.per_word)
                builder.store(builder.fadd(several, builder.load(values[r])), values[r])
                place = builder.gep(self.fitted[r], [at])
                store_vector(builder, builder.fmul(several, factors), place, "scratch", 4 * self.per_word)

    def add_block(self, block):
        """totals += the products of one block, scaled, PART numbers at a time."""
        builder = self.builder
        begin = builder.mul(block, self.size)
        left = builder.sub(self.depth, begin)
        count = builder.select(builder.icmp_signed("<", left, self.size), left, self.size)
        with counted_loop(builder, I64(0), count, PART) as done:
            rest = builder.sub(count, done)
            number = builder.select(builder.icmp_signed("<", rest, I64(PART)), rest, I64(PART))
            self.add_part(block, builder.add(begin, done), number)

    def add_part(self, block, start, count):
        """totals += the products of `count` numbers of a block from `start` on."""
        builder, per_word = self.builder, self.per_word
        whole, first = builder.sdiv(count, I64(per_word)), builder.sdiv(start, I64(per_word))
        sums = self.cells([(*place, copy) for place in self.places for copy in range(self.copies)])
        # What zero points take off: the sum of the left operand.
        values = self.cells(range(self.height), vector(F32, per_word))
        self.fit(start, whole, values)
        with counted_loop(builder, I64(0), whole) as number:
            words = [self.at(self.words, builder.add(first, number), v) for v in range(self.vectors)]
            at = builder.mul(number, I64(per_word))
            for i in range(per_word):
                right = [_in_place(builder, word, i, self.bits) for word in words]
                pointers = [builder.gep(fitted, [builder.add(at, I64(i))]) for fitted in self.fitted]
                left = [set_memory_kind(builder, builder.load(pointer), "scratch") for pointer in pointers]
                self.add(sums, right, left, i % self.copies)
        self.add_rest(start, count, first, whole, sums, values)
        for r in range(self.height):
            taken = splat(builder, _sum_of_lanes(builder, builder.load(values[r])), self.vw)
            for v in range(self.vectors):
                total = builder.load(sums[r, v, 0])
                for copy in range(1, self.copies):
                    total = builder.fadd(total, builder.load(sums[r, v, copy]))
                total = fma(builder, builder.fneg(self.zero(block, v)), taken, total)
                cell = self.totals[r, v]
                builder.store(fma(builder, self.at(self.scales, block, v), total, builder.load(cell)), cell)

    def add_rest(self, start, count, first, whole, sums, values):
        """The products of the last word, where K ends within it."""
        builder = self.builder
        done = builder.mul(whole, I64(self.per_word))
        rest = builder.sub(count, done)
        with builder.if_then(builder.icmp_signed(">", rest, I64(0)), likely=False):
            words = [self.at(self.words, builder.add(first, whole), v) for v in range(self.vectors)]
            with counted_loop(builder, I64(0), rest) as i:
                shift = builder.trunc(builder.mul(i, I64(self.bits)), I32)
                right = [_numbers(builder, word, shift, self.bits) for word in words]
                k = builder.add(builder.add(start, done), i)
                left = [builder.load(builder.gep(row, [k])) for row in self.rows]
                self.add(sums, right, left, 0)
                for r in range(self.height):
                    lane = builder.insert_element(constant(vector(F32, self.per_word), 0.0), left[r], I32(0))
                    builder.store(builder.fadd(lane, builder.load(values[r])), values[r])

    def zero(self, block, v):
        """The zero points of a block: the middle of the range where none are given."""
        if self.zeros is None:
            return constant(vector(F32, self.vw), float(1 << (self.bits - 1)))
        return self.at(self.zeros, block, v)


@intrinsic
def few_bits_tile(
    typing_context, rows, columns, width, bits, centred, height, addresses, words, scales, zeros, sums, depth, size
):
    """sums[r, j] = sum over k < depth of row(r)[k] * (q[k, j] - zero[k / size, j]) * scale[k / size, j], for a few rows.

    rows, columns, width, bits: literals, rows at most, NR, VW and the bits of a number. centred: the literal 1 where all zero
        points are 2**(bits - 1), and `zeros` is not read.
    height: one of `heights(rows)`; only rows r < height are computed.
    addresses: int64 table [rows] of the byte addresses of float32 rows.
    words: int32 [ceil(depth * bits / 32)][NR]. scales, zeros: float32 [ceil(depth / size)][NR].
    sums: float32 scratch [rows][NR], overwritten. size: of a block, a multiple of 32 / bits unless there is one block.
    """
    if not are_literals(rows, columns, width, bits, centred):
        return None
    mr, nr, vw, bits, centred = (value.literal_value for value in (rows, columns, width, bits, centred))

    def emit(context, builder, signature, values):
        chosen, table, words, scales, zeros, buffer, depth, size = values[5:]
        done = builder.append_basic_block("few.done")
        switch = builder.switch(chosen, done)
        for height in heights(mr):
            block = builder.append_basic_block(f"few.{height}")
            switch.add_case(I64(height), block)
            builder.position_at_end(block)
            pointers = []
            for r in range(height):
                address = set_memory_kind(builder, builder.load(builder.gep(table, [I64(r)])), "scratch")
                pointers.append(builder.inttoptr(address, F32.as_pointer()))
            operands = pointers, words, scales, None if centred else zeros
            few = _Few(builder, (mr, nr, vw, height), bits, size, depth, operands)
            blocks = builder.sdiv(builder.sub(builder.add(depth, size), I64(1)), size)
            with counted_loop(builder, I64(0), blocks) as number:
                few.add_block(number)
            for r, v in few.places:
                at = builder.gep(buffer, [I64(r * nr + v * vw)])
                store_vector(builder, builder.load(few.totals[r, v]), at, "scratch", 4 * vw)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    literals = [types.literal(value) for value in (mr, nr, vw, bits, centred)]
    size_ = types.int64
    return types.void(*literals, size_, _ADDRESSES, _BITS, _FLOATS, _FLOATS, _FLOATS, size_, size_), emit


@intrinsic
def unpack_bits(typing_context, columns, width, bits, centred, words, scales, zeros, panel, count):
    """panel[k, j] = (q[k, j] - zero[j]) * scale[j] for k < count, and up to the end of the last word: numbers of one block.

    columns, width, bits, centred: literals as in `few_bits_tile`. words: int32 [ceil(count * bits / 32)][NR]. scales, zeros:
    float32 [NR]. panel: float32 scratch [count, up to a multiple of 32 / bits][NR].
    """
    if not are_literals(columns, width, bits, centred):
        return None
    nr, vw, bits, centred = (value.literal_value for value in (columns, width, bits, centred))

    def emit(context, builder, signature, values):
        words, scales, zeros, panel, count = values[4:]
        per_word, type_ = WORD // bits, vector(F32, vw)
        last = builder.sdiv(builder.add(count, I64(per_word - 1)), I64(per_word))
        at = [I64(v * vw) for v in range(nr // vw)]
        scale = [load_vector(builder, builder.gep(scales, [place]), vw, "input") for place in at]
        zero = [constant(type_, float(1 << (bits - 1)))] * len(at)
        if not centred:
            zero = [load_vector(builder, builder.gep(zeros, [place]), vw, "input") for place in at]
        with counted_loop(builder, I64(0), last) as number:
            source = builder.gep(words, [builder.mul(number, I64(nr))])
            target = builder.gep(panel, [builder.mul(number, I64(nr * per_word))])
            for v, place in enumerate(at):
                word = load_vector(builder, builder.gep(source, [place]), vw, "input")
                for i in range(per_word):
                    value = builder.fsub(_numbers(builder, word, I32(bits * i), bits), zero[v])
                    pointer = builder.gep(target, [I64(i * nr + v * vw)])
                    store_vector(builder, builder.fmul(value, scale[v]), pointer, "scratch", 4 * vw)
        return context.get_dummy_value()

    literals = [types.literal(value) for value in (nr, vw, bits, centred)]
    return types.void(*literals, _BITS, _FLOATS, _FLOATS, _FLOATS, types.int64), emit
