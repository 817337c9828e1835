"""Windows of convolutions on CUDA: a table of them in shared memory, and copies of tiles gathered from them.

A row of the left operand is a window of the input: element k is channel k % channels of tap k / channels. What tiles
are and how they lie is in kernels/cuda/tiles.py.
"""

# ruff: noqa: ARG001  (Numba prescribes the parameters of intrinsics and of their emitters)

from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from minicc.kernels.cuda.tiles import CHUNK, I32, I64, ROW, SHARED, assembly, copy_piece, each_row, hops, known, own_place

# Bytes of a row's entry in the table of windows: address, image, pixel, and which taps lie inside the input.
WINDOW = 24
_IMAGE, _PIXEL, _INSIDE = 8, 12, 16


@intrinsic
def divide(typing_context, number, divisor):
    """The quotient of two int32 that are not negative."""

    def emit(context, builder, signature, values):
        return builder.udiv(*values)

    return types.int32(types.int32, types.int32), emit


@intrinsic
def reciprocal(typing_context, divisor):
    """What divides by a divisor of at least 1 in `copy_windows`: ceil(2**32 / divisor), 0 for 1."""

    def emit(context, builder, signature, values):
        return builder.add(builder.udiv(I32(0xFFFFFFFF), values[0]), I32(1))

    return types.int32(types.int32), emit


def _quotient(builder, number, divisor, inverse):
    """number / divisor; exact while number * divisor < 2**32. (Granlund and Montgomery, 1994, section 4.)"""
    product_ = builder.mul(builder.zext(number, I64), builder.zext(inverse, I64))
    high = builder.trunc(builder.lshr(product_, I64(32)), I32)
    return builder.select(builder.icmp_unsigned("==", divisor, I32(1)), number, high)


@intrinsic
def inside_taps(typing_context, first, step, taps, extent):
    """Bits: whether position first + number * step of each of at most 32 taps lies in [0, extent)."""

    def emit(context, builder, signature, values):
        first, step, taps, extent = values
        bits = builder.alloca(I32)
        builder.store(I32(0), bits)
        number = builder.alloca(I32)
        builder.store(I32(0), number)
        test, body, after = (builder.append_basic_block(name) for name in ("taps.test", "taps.body", "taps.after"))
        builder.branch(test)
        builder.position_at_end(test)
        builder.cbranch(builder.icmp_signed("<", builder.load(number), taps), body, after)
        builder.position_at_end(body)
        here = builder.load(number)
        position = builder.add(first, builder.mul(here, step))
        bit = builder.shl(builder.zext(builder.icmp_unsigned("<", position, extent), I32), here)
        builder.store(builder.or_(builder.load(bits), bit), bits)
        builder.store(builder.add(here, I32(1)), number)
        builder.branch(test)
        builder.position_at_end(after)
        return builder.load(bits)

    return types.int32(*[types.int32] * 4), emit


@intrinsic
def store_window(typing_context, table, row, address, image, pixel, inside):
    """Notes where a row's window begins: the address of its first element, which may not exist, which output the row
    is, and which taps exist.
    """

    def emit(context, builder, signature, values):
        table, row, address, *numbers = values
        where = builder.add(table, builder.mul(row, I32(WINDOW)))
        builder.store(address, builder.inttoptr(where, I64.as_pointer(SHARED)))
        for at, number in zip((_IMAGE, _PIXEL, _INSIDE), numbers):
            builder.store(number, builder.inttoptr(builder.add(where, I32(at)), I32.as_pointer(SHARED)))
        return context.get_dummy_value()

    short = types.int32
    return types.void(short, short, types.int64, short, short, short), emit


def _table_entry(builder, table, row, at, type_):
    where = builder.add(builder.add(table, builder.mul(row, I32(WINDOW))), I32(at))
    return builder.load(builder.inttoptr(where, type_.as_pointer(SHARED)))


@intrinsic
def load_pixel(typing_context, table, row):
    """(image, pixel) of a row, as `store_window` noted them."""
    pair = types.UniTuple(types.int32, 2)

    def emit(context, builder, signature, values):
        table, row = values
        found = [_table_entry(builder, table, row, at, I32) for at in (_IMAGE, _PIXEL)]
        return context.make_tuple(builder, pair, found)

    return pair(types.int32, types.int32), emit


@intrinsic
def window_rows(typing_context, rows, threads, table, tid):
    """As `tile_rows`, from the table."""
    return _from_table(rows, threads, 0, types.int64, I64)


@intrinsic
def window_taps(typing_context, rows, threads, table, tid):
    """Which taps of a thread's rows lie inside the input, from the table: a tuple of int32."""
    return _from_table(rows, threads, _INSIDE, types.int32, I32)


def _from_table(rows, threads, at, type_, llvm):
    if not known(rows, threads):
        return None
    count, width = rows.literal_value, threads.literal_value
    tuple_ = types.UniTuple(type_, len(hops(count, width)))

    def emit(context, builder, signature, values):
        row = builder.lshr(values[3], I32(3))
        last = I32(count - 1)
        found = []
        for hop in hops(count, width):
            here = builder.add(row, I32(hop))
            here = builder.select(builder.icmp_signed("<", here, last), here, last)
            found.append(_table_entry(builder, values[2], here, at, llvm))
        return context.make_tuple(builder, tuple_, found)

    return tuple_(types.literal(count), types.literal(width), types.int32, types.int32), emit


@intrinsic
def copy_windows(typing_context, rows, threads, size, piece, shared, sources, inside, k, sizes, inverses, strides, tid):
    """As `copy_tile`, from windows: element k of a row is channel k % channels of the window's tap k / channels.

    piece:    literal: the largest power of two up to 16 that divides addresses, strides and channels in bytes.
    sources, inside: `window_rows`, `window_taps`; taps of rows, columns, planes are bits from 0, KW and KW + KH on.
    sizes:    (channels, KW, KH, KD); inverses: the reciprocals of the first three.
    strides:  bytes from tap to tap along columns, rows and planes. Taps outside the input are 0.
    """
    if not known(rows, threads, size, piece):
        return None
    count, width, bytes_, step = (v.literal_value for v in (rows, threads, size, piece))
    number_of_rows = len(hops(count, width))

    def emit(context, builder, signature, values):
        shared, sources, inside, k, sizes, inverses, strides, tid = values[4:]
        sources, inside = ([builder.extract_value(v, i) for i in range(number_of_rows)] for v in (sources, inside))
        channels, across, down, deep = (builder.extract_value(sizes, i) for i in range(4))
        inverses = [builder.extract_value(inverses, i) for i in range(3)]
        strides = [builder.extract_value(strides, i) for i in range(3)]
        chunk, row, target = own_place(builder, shared, tid)
        parts = []
        for at in range(0, CHUNK, step):
            element = builder.add(builder.add(k, builder.mul(chunk, I32(CHUNK // bytes_))), I32(at // bytes_))
            tap = _quotient(builder, element, channels, inverses[0])
            channel = builder.sub(element, builder.mul(tap, channels))
            line = _quotient(builder, tap, across, inverses[1])
            z = _quotient(builder, line, down, inverses[2])
            y, x = builder.sub(line, builder.mul(z, down)), builder.sub(tap, builder.mul(line, across))
            offset = builder.mul(channel, I32(bytes_))
            for number, stride in zip((x, y, z), strides):
                offset = builder.add(offset, builder.mul(number, stride))
            bit = builder.shl(I32(1), x)
            bit = builder.or_(bit, builder.shl(I32(1), builder.add(y, across)))
            bit = builder.or_(bit, builder.shl(I32(1), builder.add(builder.add(z, across), down)))
            # Taps behind the last plane have bits that no row has, unless the shift wraps.
            bit = builder.select(builder.icmp_unsigned("<", z, deep), bit, I32(-1))
            parts.append((at, builder.sext(offset, I64), bit))

        def copy(number, hop):
            for at, offset, bit in parts:
                exists = builder.icmp_signed("==", builder.and_(inside[number], bit), bit)
                source = builder.add(sources[number], offset)
                place = builder.add(target, I32(hop * ROW + at))
                _copy_or_clear(builder, step, place, source, exists)

        each_row(builder, count, width, row, copy)
        return context.get_dummy_value()

    literals = [types.literal(v) for v in (count, width, bytes_, step)]
    short = types.int32
    tuples = [types.UniTuple(types.int64, number_of_rows), types.UniTuple(short, number_of_rows)]
    given = [types.UniTuple(short, 4), types.UniTuple(short, 3), types.UniTuple(short, 3)]
    return types.void(*literals, short, *tuples, short, *given, short), emit


def _copy_or_clear(builder, step, target, source, exists):
    """`step` bytes of global to shared memory, or zeros where they do not exist."""
    if step < 4:
        copy_piece(builder, step, target, source, builder.select(exists, I32(step), I32(0)))
        return
    cache = "cg" if step == CHUNK else "ca"
    text = (
        "{.reg .pred p; setp.eq.u32 p, $2, 0; "
        f"cp.async.{cache}.shared.global [$0], [$1], {step}, p;}}"
    )
    assembly(builder, text, "r,l,r", ir.VoidType(), [target, source, builder.zext(exists, I32)])
