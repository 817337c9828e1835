"""Tile intrinsics for products of 8-bit integers with exact 32-bit sums.

Both operands consist of words of 32 bits along the depth. A word has two int16, or where the target multiplies bytes four of
them: unsigned ones of the left operand, signed ones of the right. One instruction multiplies the numbers of a word and adds
the products to a sum. Rows of the left operand are gathered into such words first.

Bytes keep their zero points: with z of the left operand and y[j] of the right one, the sum of (x - z) * (w - y[j]) is the sum of
x * w, less z times the total of w, less y[j] times the sum of x - z. Here the last two are where a sum begins.
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from minicc.kernels.cpu.intrinsics import (
    I8,
    I16,
    I32,
    I64,
    call_vector_intrinsic,
    constant,
    counted_loop,
    load_vector,
    outlined,
    set_memory_kind,
    splat,
    stack_array,
    store_vector,
    type_suffix,
    vector,
)
from minicc.kernels.cpu.tiles import are_literals, heights

BYTES = 4  # numbers of a word that are bytes; else two int16
COPIED = (64, 16, 4, 1)  # bytes at a time
SPILLED = 64  # bytes behind a row that may be written with it

_ADDRESSES = types.CPointer(types.int64)
_WORDS = types.CPointer(types.int32)


def add_byte_products(builder, total, unsigned, signed):
    """total + the sums of four products of bytes in each word, vectors of int32: one instruction of targets with VNNI."""
    octets = vector(I8, 4 * total.type.count)
    operands = [total, builder.bitcast(unsigned, octets), builder.bitcast(signed, octets)]
    return call_vector_intrinsic(builder, f"llvm.x86.avx512.vpdpbusd.{32 * total.type.count}", operands, total.type)


@intrinsic
def gather_words(
    typing_context, rows, width, numbers, summed, table, bounds, x, count, channels, zero, row_words, gathered, shifts
):
    """The channels of `count` taps as words: [rows][count][ceil(channels / numbers)].

    rows, width: literals MR and VW. numbers: of a word, the literal 2 or BYTES.
    table:  addresses [count][MR], in which 0 stands for a row of padding; bounds: int64 [2][MR], of each row the first channel
            that does not lie in the padding and the one behind the last.
    x:      pointer that is added to the addresses: its element type, and the offset of the first channel.
    zero:   int32, the zero point, of bytes as unsigned ones. int16 come less it; bytes keep it, and padding is it.
    shifts: int32 [MR], the sums of each row's bytes less the zero point, where the literal `summed` is not 0.
    gathered: rows of row_words words, and SPILLED bytes more.
    A function of its own: inside the kernel's loops LLVM would copy it for each of their conditions.
    """
    if not are_literals(rows, width, numbers, summed):
        return None
    mr, vw, numbers, summed = (value.literal_value for value in (rows, width, numbers, summed))
    signed, fill = x.dtype.signed, _fill_with_bytes if numbers == BYTES else _fill_with_halves
    masked = 4 * vw == SPILLED  # vectors of so many bytes can be loaded in part

    def body(builder, arguments):
        table, bounds, x, count, channels, zero, row_words, gathered, shifts = arguments
        words = builder.sdiv(builder.add(channels, I64(numbers - 1)), I64(numbers))
        # Row by row, because what is written behind one belongs to the next.
        with counted_loop(builder, I64(0), I64(mr)) as r, counted_loop(builder, I64(0), count) as t:
            start = builder.add(builder.mul(r, row_words), builder.mul(t, words))
            at = _word(builder, table, builder.add(builder.mul(t, I64(mr)), r))
            first, end = _word(builder, bounds, r), _word(builder, bounds, builder.add(r, I64(mr)))
            end = builder.select(builder.icmp_unsigned("==", at, I64(0)), first, end)
            source = builder.inttoptr(builder.add(at, builder.ptrtoint(x, I64)), x.type)
            fill(builder, source, signed, (first, end, channels), zero, builder.gep(gathered, [start]), words, masked)
        if summed:
            with counted_loop(builder, I64(0), I64(mr)) as r:
                row = builder.gep(gathered, [builder.mul(r, row_words)])
                total = _sum_of_bytes(builder, row, builder.mul(count, words), vw)
                whole = builder.trunc(builder.mul(builder.mul(count, words), I64(BYTES)), I32)
                shift = builder.sub(total, builder.mul(whole, zero))
                set_memory_kind(builder, builder.store(shift, builder.gep(shifts, [r])), "scratch")

    def emit(context, builder, signature, values):
        outlined(builder, f"gather_words_{mr}_{numbers}_{summed}_{'signed' if signed else 'unsigned'}", values[4:], body)
        return context.get_dummy_value()

    size, literals = types.int64, [types.literal(value) for value in (mr, vw, numbers, summed)]
    return types.void(*literals, _ADDRESSES, _ADDRESSES, x, size, size, types.int32, size, _WORDS, _WORDS), emit


def _word(builder, table, at):
    return set_memory_kind(builder, builder.load(builder.gep(table, [at])), "scratch")


def _fill_with_halves(builder, source, signed, bounds, zero, target, words, masked):
    """Channels as int16 less the zero point, 0 in the padding."""
    first, end, _ = bounds
    row = builder.bitcast(target, I16.as_pointer())
    whole = builder.and_(builder.icmp_signed("==", first, I64(0)), builder.icmp_signed("==", end, bounds[2]))
    with builder.if_else(whole) as (then, otherwise):
        with then:
            last = builder.gep(target, [builder.sub(words, I64(1))])
            set_memory_kind(builder, builder.store(I32(0), last), "scratch")
        with otherwise:
            cgutils.memset(builder, row, builder.mul(words, I64(4)), 0)
    with counted_loop(builder, first, end) as k:
        value = set_memory_kind(builder, builder.load(builder.gep(source, [k])), "input")
        value = builder.sext(value, I16) if signed else builder.zext(value, I16)
        value = builder.sub(value, builder.trunc(zero, I16))
        set_memory_kind(builder, builder.store(value, builder.gep(row, [k])), "scratch")


def _fill_with_bytes(builder, source, signed, bounds, zero, target, words, masked):
    """Channels as unsigned bytes, the zero point in the padding."""
    first, end, channels = bounds
    row, source = builder.bitcast(target, I8.as_pointer()), builder.bitcast(source, I8.as_pointer())
    padded = builder.or_(builder.icmp_signed("!=", first, I64(0)), builder.icmp_signed("!=", end, channels))
    with builder.if_else(padded) as (then, otherwise):
        with then:
            cgutils.memset(builder, row, builder.mul(words, I64(BYTES)), builder.trunc(zero, I8))
            _copy_bytes(builder, source, signed, first, end, row)
        with otherwise:
            if masked:
                _copy_vectors(builder, source, signed, channels, builder.trunc(zero, I8), row)
            else:  # the last word may be filled in part only
                last = builder.gep(target, [builder.sub(words, I64(1))])
                set_memory_kind(builder, builder.store(builder.mul(zero, I32(0x01010101)), last), "scratch")
                _copy_bytes(builder, source, signed, first, end, row)


def _copy_vectors(builder, source, signed, count, zero, row):
    """`count` bytes in whole vectors, with the zero point behind them."""
    type_ = vector(I8, SPILLED)
    lanes = ir.Constant(type_, [I8(lane) for lane in range(SPILLED)])
    behind = splat(builder, builder.xor(zero, I8(0x80)) if signed else zero, SPILLED)
    with counted_loop(builder, I64(0), count, SPILLED) as k:
        left = builder.sub(count, k)
        left = builder.select(builder.icmp_signed("<", left, I64(SPILLED)), left, I64(SPILLED))
        inside = builder.icmp_unsigned("<", lanes, splat(builder, builder.trunc(left, I8), SPILLED))
        memory = builder.bitcast(builder.gep(source, [k]), type_.as_pointer())
        part = call_vector_intrinsic(builder, f"llvm.masked.load.v{SPILLED}i8.p0", [memory, I32(1), inside, behind], type_)
        set_memory_kind(builder, part, "input")
        if signed:
            part = builder.xor(part, constant(type_, 0x80))
        store_vector(builder, part, builder.gep(row, [k]), "scratch", 1)


def _copy_bytes(builder, source, signed, first, end, row):
    for width in COPIED:
        here = builder.add(first, builder.and_(builder.sub(end, first), I64(-width)))
        with counted_loop(builder, first, here, width) as k:
            part = load_vector(builder, builder.gep(source, [k]), width, "input", 1)
            if signed:
                part = builder.xor(part, constant(vector(I8, width), 0x80))
            store_vector(builder, part, builder.gep(row, [k]), "scratch", 1)
        first = here


def _sum_of_bytes(builder, row, words, vw):
    """The sum of the unsigned bytes of a row as int32."""
    type_, ones = vector(I32, vw), constant(vector(I32, vw), 0x01010101)
    total = stack_array(builder, type_, 1)
    builder.store(constant(type_, 0), total)
    whole = builder.and_(words, I64(-vw))
    with counted_loop(builder, I64(0), whole, vw) as k:
        part = load_vector(builder, builder.gep(row, [k]), vw, "scratch", 4)
        builder.store(add_byte_products(builder, builder.load(total), part, ones), total)
    with counted_loop(builder, whole, words) as k:
        part = builder.insert_element(constant(type_, 0), _word(builder, row, k), I32(0))
        builder.store(add_byte_products(builder, builder.load(total), part, ones), total)
    return call_vector_intrinsic(builder, f"llvm.vector.reduce.add.{type_suffix(type_)}", [builder.load(total)], I32)


@intrinsic
def integer_tile(
    typing_context, rows, columns, width, numbers, summed, height, left, stride, panel, tile, words, first, zero, totals, shifts
):
    """tile[r, j] (+)= sum over k < words of the products of the words left[r * stride + k] and panel[k][j], modulo 2**32.

    rows, columns, width: literals MR, NR and VW (words of a vector). numbers, summed: as in `gather_words`.
    height: one of `heights(MR)`; only rows r < height are computed.
    left:   scratch rows of words; panel: [words][NR] words. int16 are at most 255 in magnitude.
    tile:   int32 scratch [MR][NR]; overwritten when `first`, else added to.
    zero, totals, shifts: of bytes, the left operand's zero point; int32 [NR], sums of all weights of a column, and behind them,
        where `summed`, their zero points [NR]; and what `gather_words` gave for the rows.
    """
    if not are_literals(rows, columns, width, numbers, summed):
        return None
    mr, nr, vw, numbers, summed = (value.literal_value for value in (rows, columns, width, numbers, summed))

    def emit(context, builder, signature, values):
        chosen, left, stride, panel, buffer, words, first, zero, totals, shifts = values[5:]
        begin, zeros = [constant(vector(I32, vw), 0)] * (nr // vw), []
        if numbers == BYTES:
            taken = splat(builder, builder.neg(zero), vw)
            planes = [load_vector(builder, builder.gep(totals, [I64(at)]), vw, "input") for at in range(0, (1 + summed) * nr, vw)]
            begin, zeros = [builder.mul(taken, total) for total in planes[: nr // vw]], planes[nr // vw :]
        done = builder.append_basic_block("tile.done")
        switch = builder.switch(chosen, done)
        for height in heights(mr):
            block = builder.append_basic_block(f"tile.{height}")
            switch.add_case(I64(height), block)
            builder.position_at_end(block)
            places = [(r, v) for r in range(height) for v in range(nr // vw)]
            sums = {place: stack_array(builder, vector(I32, vw), 1) for place in places}
            for r, v in places:
                earlier = load_vector(builder, builder.gep(buffer, [I64(r * nr + v * vw)]), vw, "scratch", 64)
                start = builder.select(first, begin[v], earlier)
                if summed:
                    shift = splat(builder, _word(builder, shifts, I64(r)), vw)
                    start = builder.sub(start, builder.mul(shift, zeros[v]))
                builder.store(start, sums[r, v])
            _add_words(builder, (nr, vw, numbers, height), left, stride, panel, words, sums)
            for r, v in places:
                at = builder.gep(buffer, [I64(r * nr + v * vw)])
                store_vector(builder, builder.load(sums[r, v]), at, "scratch", 64)
            builder.branch(done)
        builder.position_at_end(done)
        return context.get_dummy_value()

    literals = [types.literal(value) for value in (mr, nr, vw, numbers, summed)]
    size = types.int64
    operands = [_WORDS, size, _WORDS, _WORDS, size, types.boolean, types.int32, _WORDS, _WORDS]
    return types.void(*literals, size, *operands), emit


def _add_words(builder, shape, left, stride, panel, words, sums):
    nr, vw, numbers, height = shape
    rows = [builder.gep(left, [builder.mul(stride, I64(r))]) for r in range(height)]
    with counted_loop(builder, I64(0), words) as k:
        b = builder.gep(panel, [builder.mul(k, I64(nr))])
        right = [load_vector(builder, builder.gep(b, [I64(v * vw)]), vw, "input") for v in range(nr // vw)]
        for r in range(height):
            word = splat(builder, _word(builder, rows[r], k), vw)
            for v in range(nr // vw):
                total = builder.load(sums[r, v])
                if numbers == BYTES:
                    total = add_byte_products(builder, total, word, right[v])
                else:
                    total = builder.add(total, _products_of_pairs(builder, word, right[v], vw))
                builder.store(total, sums[r, v])


def _products_of_pairs(builder, x, y, width):
    """x[2i] * y[2i] + x[2i + 1] * y[2i + 1] of int16, in the form LLVM makes pmaddwd or vpdpwssd of."""
    x, y = (builder.bitcast(words, vector(I16, 2 * width)) for words in (x, y))
    wide = vector(I32, 2 * width)
    products = builder.mul(builder.sext(x, wide), builder.sext(y, wide), flags=["nsw"])
    undefined = ir.Constant(wide, ir.Undefined)
    even, odd = (ir.Constant(vector(I32, width), [I32(2 * i + start) for i in range(width)]) for start in (0, 1))
    return builder.add(builder.shuffle_vector(products, undefined, even), builder.shuffle_vector(products, undefined, odd))
