"""Tile intrinsics for products whose left operand is rounded to 8 bits, block by block, with right operands of 2 or 4 bits.

A block of a row becomes signed bytes of one scale; four of them times four unsigned numbers of a column is one instruction and
exact, and so are the sums of a block. A word of a panel (see bit_tiles.py) holds 32 / BITS consecutive numbers: shifted by
i * BITS and masked, its bytes are numbers i, i + s, i + 2s, i + 3s of them, with s = 8 / BITS. In that order lie the bytes of a
row.
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from minicc.kernels.cpu.bit_tiles import WORD
from minicc.kernels.cpu.integer_tiles import add_byte_products
from minicc.kernels.cpu.intrinsics import (
    F32,
    I8,
    I16,
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
from minicc.kernels.cpu.tiles import are_literals, cover_rows

LARGEST = 127.0  # of a rounded number

_BITS = types.CPointer(types.int32)
_FLOATS = types.CPointer(types.float32)


@intrinsic
def round_block(typing_context, bits, source, target, scale, total, count, size):
    """Round `count` floats to 8 bits, with zeros behind them up to `size`.

    bits: a literal, of the numbers they will meet: it says in which order their bytes lie.
    source: float32 [count]. target: int32 [size / 4]. scale, total: float32 [1], what one stands for and the sum of the rounded
    numbers. Largest magnitude 127; where one is NaN, or infinite, the scale is.
    """
    if not are_literals(bits):
        return None
    lanes = WORD // bits.literal_value

    def emit(context, builder, signature, values):
        source, target, scale, total, count, size = values[1:]
        floats, integers = vector(F32, lanes), vector(I32, lanes)
        whole = builder.and_(count, I64(-lanes))
        rest = builder.sub(count, whole)
        last = stack_array(builder, F32, lanes)
        store_vector(builder, constant(floats, 0.0), last, "scratch", 4 * lanes)
        with counted_loop(builder, I64(0), rest) as k:
            element = builder.load(builder.gep(source, [builder.add(whole, k)]))
            set_memory_kind(builder, builder.store(element, builder.gep(last, [k])), "scratch")
        # The largest magnitude by its bits, in whose order NaN is above infinity.
        largest = stack_array(builder, integers, 1)
        ended = load_vector(builder, last, lanes, "scratch", 4 * lanes)
        builder.store(_magnitude(builder, ended), largest)
        with counted_loop(builder, I64(0), whole, lanes) as k:
            found = _magnitude(builder, load_vector(builder, builder.gep(source, [k]), lanes))
            known = builder.load(largest)
            builder.store(builder.select(builder.icmp_unsigned(">", found, known), found, known), largest)
        name = f"llvm.vector.reduce.umax.{type_suffix(integers)}"
        top = builder.bitcast(call_vector_intrinsic(builder, name, [builder.load(largest)], I32), F32)
        is_zero = builder.fcmp_ordered("==", top, constant(F32, 0.0))
        factor = builder.select(is_zero, constant(F32, 0.0), builder.fdiv(constant(F32, LARGEST), top))
        sums = stack_array(builder, integers, 1)
        builder.store(constant(integers, 0), sums)

        def rounded(group, at):
            scaled = builder.fmul(group, splat(builder, factor, lanes))
            near = call_vector_intrinsic(builder, f"llvm.rint.{type_suffix(floats)}", [scaled], floats)
            name = f"llvm.fptosi.sat.{type_suffix(integers)}.{type_suffix(floats)}"  # NaN becomes 0
            numbers = call_vector_intrinsic(builder, name, [near], integers)
            builder.store(builder.add(builder.load(sums), numbers), sums)
            apart = lanes // 4
            order = [I32(first + apart * t) for first in range(apart) for t in range(4)]
            narrow = builder.trunc(numbers, vector(I8, lanes))
            ordered = builder.shuffle_vector(narrow, narrow, ir.Constant(vector(I32, lanes), order))
            place = builder.bitcast(builder.gep(target, [builder.sdiv(at, I64(4))]), I8.as_pointer())
            store_vector(builder, ordered, place, "output")

        with counted_loop(builder, I64(0), whole, lanes) as k:
            rounded(load_vector(builder, builder.gep(source, [k]), lanes), k)
        with builder.if_then(builder.icmp_signed(">", rest, I64(0)), likely=False):
            rounded(ended, whole)
        end = builder.add(whole, builder.select(builder.icmp_signed(">", rest, I64(0)), I64(lanes), I64(0)))
        with counted_loop(builder, end, size, 4) as k:
            set_memory_kind(builder, builder.store(I32(0), builder.gep(target, [builder.sdiv(k, I64(4))])), "output")
        name = f"llvm.vector.reduce.add.{type_suffix(integers)}"
        added = builder.sitofp(call_vector_intrinsic(builder, name, [builder.load(sums)], I32), F32)
        set_memory_kind(builder, builder.store(builder.fdiv(top, constant(F32, LARGEST)), scale), "output")
        set_memory_kind(builder, builder.store(added, total), "output")
        return context.get_dummy_value()

    size_ = types.int64
    return types.void(types.literal(bits.literal_value), _FLOATS, _BITS, _FLOATS, _FLOATS, size_, size_), emit


def _magnitude(builder, floats):
    integers = vector(I32, floats.type.count)
    return builder.and_(builder.bitcast(floats, integers), constant(integers, 0x7FFFFFFF))


def _add_dot(builder, total, numbers, left, vnni):
    """total + the sums of four unsigned by four signed bytes of each lane of 32 bits, vectors of int32.

    numbers: unsigned, at most 15, so that pairs of products fit 16 bits.
    """
    if vnni:
        return add_byte_products(builder, total, numbers, left)
    width = total.type.count
    octets = vector(I8, 4 * width)
    numbers, left = builder.bitcast(numbers, octets), builder.bitcast(left, octets)
    pairs, ones = vector(I16, 2 * width), constant(vector(I16, 2 * width), 1)
    multiply, add = ("avx512.pmaddubs.w.512", "avx512.pmaddw.d.512") if width == 16 else ("avx2.pmadd.ub.sw", "avx2.pmadd.wd")
    products = call_vector_intrinsic(builder, f"llvm.x86.{multiply}", [numbers, left], pairs)
    return builder.add(total, call_vector_intrinsic(builder, f"llvm.x86.{add}", [products, ones], total.type))


@intrinsic
def rounded_product(
    typing_context, rows, columns, width, bits, centred, vnni, left, left_scales, left_sums, words, scales, zeros, sums, count,
    blocks, size,
):  # fmt: skip
    """sums[r, j] = sum over blocks b of left_scales[r, b] * scales[b, j] * (left[r] . q[:, j] - zeros[b, j] * left_sums[r, b]).

    rows, columns, width, bits, centred: literals as in `few_bits_tile`; vnni: the literal 1 where the target multiplies and adds
        bytes in one instruction.
    left: int32 [count][blocks * size / 4]; left_scales, left_sums: float32 [count][blocks], all made by `round_block`.
    words, scales, zeros: panels as in `few_bits_tile`. sums: float32 scratch [count][NR], overwritten. size: of a block, a
        multiple of 32 / bits.
    """
    if not are_literals(rows, columns, width, bits, centred, vnni):
        return None
    mr, nr, vw, bits, centred, vnni = (v.literal_value for v in (rows, columns, width, bits, centred, vnni))
    vectors, per_word, type_ = nr // vw, WORD // bits, vector(I32, vw)
    mask = constant(type_, sum(((1 << bits) - 1) << (8 * t) for t in range(4)))

    def emit(context, builder, signature, values):
        left, left_scales, left_sums, words, scales, zeros, sums, count, blocks, size = values[6:]
        per_block = builder.sdiv(size, I64(per_word))
        row_words = builder.mul(blocks, builder.sdiv(size, I64(4)))

        def panel_vector(pointer, index, v, kind="input"):
            at = builder.add(builder.mul(index, I64(nr)), I64(v * vw))
            return load_vector(builder, builder.gep(pointer, [at]), vw, kind)

        def tile(height, first):
            places = [(r, v) for r in range(height) for v in range(vectors)]
            totals = {place: stack_array(builder, vector(F32, vw), 1) for place in places}
            exact = {place: stack_array(builder, type_, 1) for place in places}
            for place in places:
                builder.store(constant(vector(F32, vw), 0.0), totals[place])
            numbers = [builder.add(first, I64(r)) for r in range(height)]
            starts = [builder.gep(left, [builder.mul(number, row_words)]) for number in numbers]
            with counted_loop(builder, I64(0), blocks) as block:
                for place in places:
                    builder.store(constant(type_, 0), exact[place])
                word_first = builder.mul(block, per_block)
                with counted_loop(builder, I64(0), per_block) as word:
                    index = builder.add(word_first, word)
                    packed = [panel_vector(words, index, v) for v in range(vectors)]
                    for i in range(per_word // 4):
                        shifted = [builder.lshr(p, constant(type_, bits * i)) if i else p for p in packed]
                        right = [builder.and_(s, mask) for s in shifted]
                        at = builder.add(builder.mul(index, I64(per_word // 4)), I64(i))
                        for r in range(height):
                            four = set_memory_kind(builder, builder.load(builder.gep(starts[r], [at])), "input")
                            spread = splat(builder, four, vw)
                            for v in range(vectors):
                                cell = exact[r, v]
                                builder.store(_add_dot(builder, builder.load(cell), right[v], spread, vnni), cell)
                weights = [panel_vector(scales, block, v) for v in range(vectors)]
                middle = constant(vector(F32, vw), float(1 << (bits - 1)))
                points = [middle if centred else panel_vector(zeros, block, v) for v in range(vectors)]
                for r in range(height):
                    at = builder.add(builder.mul(numbers[r], blocks), block)
                    scale, total = (builder.load(builder.gep(pointer, [at])) for pointer in (left_scales, left_sums))
                    taken, factor = splat(builder, builder.fneg(total), vw), splat(builder, scale, vw)
                    for v in range(vectors):
                        found = builder.sitofp(builder.load(exact[r, v]), vector(F32, vw))
                        found = fma(builder, points[v], taken, found)
                        both = builder.fmul(weights[v], factor)
                        builder.store(fma(builder, both, found, builder.load(totals[r, v])), totals[r, v])
            for r, v in places:
                at = builder.add(builder.mul(numbers[r], I64(nr)), I64(v * vw))
                store_vector(builder, builder.load(totals[r, v]), builder.gep(sums, [at]), "scratch", 4 * vw)

        cover_rows(builder, mr, count, tile)
        return context.get_dummy_value()

    literals = [types.literal(value) for value in (mr, nr, vw, bits, centred, vnni)]
    n = types.int64
    return types.void(*literals, _BITS, _FLOATS, _FLOATS, _BITS, _FLOATS, _FLOATS, _FLOATS, n, n, n), emit
